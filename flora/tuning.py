"""`flora tune`: measures on this GPU which form and which blocks of the kernels are fastest, and keeps the table for later runs."""
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flora.errors import BackendError

# (hidden, intermediate) of Llama layers of 7B, 1B, 3B, 70B and of SmolLM2-135M; tokens of a batch; ranks. What is likeliest to be
# asked for comes first: of each list, the first two, three and one.
MODELS = ((4096, 11008), (2048, 8192), (3072, 8192), (8192, 28672), (576, 1536))
ROWS, RANKS = (8192, 512, 5120, 2048, 32768), (16, 64, 4, 256)


def _calls(hidden: int, intermediate: int) -> Iterator[tuple[int, int, int]]:
    """(out, in, layers that read the same x) of a decoder layer: q, k and v; gate and up; o; down."""
    yield from ((hidden, hidden, 3), (intermediate, hidden, 2), (hidden, hidden, 1), (hidden, intermediate, 1))


def cases(shapes: Sequence[tuple[int, int]] | None, rows: Sequence[int] | None,
          ranks: Sequence[int] | None) -> list[tuple[Any, ...]]:
    """(rows, out, in, ranks, clients?, layers) of all that is to be measured, the likeliest first, one adapter before clients."""
    calls = [[(*shape, 1)] for shape in shapes] if shapes else [list(_calls(*model)) for model in MODELS]
    found = []
    for clients, (r, rank), (m, count), (n, some) in itertools.product((False, True), enumerate(ranks or RANKS),
                                                                      enumerate(rows or ROWS), enumerate(calls)):
        rest = not (shapes or rows or ranks) and (r > 0 or m > 2 or n > 1)
        found += [(rest, (count, N, K, rank, clients, layers)) for N, K, layers in some]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]                    # a stable sort


def tune(shapes: Sequence[tuple[int, int]] | None = None, rows: Sequence[int] | None = None, ranks: Sequence[int] | None = None,
         dtype: str = "bfloat16", minutes: float | None = None) -> Path:
    """Measures forms and blocks for shapes (out, in), rows (tokens of a batch), ranks and a dtype, prints each, and writes this
    GPU's table, whose path it returns. None: those of usual models. What the table has is not measured again.

    minutes: no shape is begun after them; the next start goes on from there. Raises BackendError where there is no GPU or no
    Triton.
    """
    import torch

    from flora import kernels
    if not torch.cuda.is_available():
        raise BackendError("expected an NVIDIA GPU to measure on; found none. Nothing has to be tuned for the CPU.")
    with kernels.use("triton"):
        from flora.kernels.triton import rule
        from flora.kernels.triton.tune import Shape
        from flora.kernels.triton.tune import tune as tuned

        left = 0
        for left, results in tuned([Shape(*case) for case in cases(shapes, rows, ranks)], getattr(torch, dtype), "cuda", minutes):
            for result in results:
                print(told(result), flush=True)
            print(f"{left} shapes left", flush=True)
        written = rule.own_tables() / f"{rule.device_key(torch.cuda.get_device_name())}.json"
        print(f"{written} is read by every later run" + (f"; {left} shapes are left: run flora tune again for them" * (left > 0)))
    return written


def told(result: Any) -> str:
    """One line: what was taken for a key, its microseconds, and how much faster it is than what is taken where nothing was
    measured."""
    floor, taken = next(iter(result.seconds.values())), result.seconds[result.taken]
    what = f"skinny {result.taken.skinny}, base {result.taken.base}" if hasattr(result.taken, "skinny") else "x".join(
        str(n) for n in (result.taken.block_m, result.taken.block_n, result.taken.block_k, result.taken.block_r)) + (
        f" splits {result.taken.splits} warps {result.taken.num_warps} stages {result.taken.num_stages}")
    return f"{result.key}: {what}, {taken * 1e6:.1f} us, {floor / taken:.2f} times the first of {len(result.seconds)} tried"

"""`flora tune`: measures on this GPU which form of the kernels is fastest for each shape, and keeps the table for later runs."""
import itertools
from collections.abc import Sequence
from pathlib import Path

from flora.errors import BackendError

# (out, in) of the linears of SmolLM2-135M and of Llama layers of 1B, 3B, 7B and 70B.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048), (2048, 8192), (3072, 3072), (8192, 3072), (3072, 8192),
          (4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672))
ROWS, RANKS = (512, 2048, 8192, 32768), (4, 16, 64, 256)


def tune(shapes: Sequence[tuple[int, int]] | None = None, rows: Sequence[int] | None = None, ranks: Sequence[int] | None = None,
         dtype: str = "bfloat16") -> Path:
    """Measures every form for shapes (out, in), rows (tokens of a batch), ranks and a dtype, prints each, and writes this GPU's
    table, whose path it returns. None: those of usual models. Raises BackendError where there is no GPU or no Triton."""
    import torch

    from flora import kernels
    if not torch.cuda.is_available():
        raise BackendError("expected an NVIDIA GPU to measure on; found none. Nothing has to be tuned for the CPU.")
    with kernels.use("triton"):
        from flora.kernels.triton.rule import FLOOR, device_key, own_tables
        from flora.kernels.triton.tune import Shape
        from flora.kernels.triton.tune import tune as tuned

        cases = [Shape(count, *shape, rank, clients) for shape, count, rank, clients in
                 itertools.product(shapes or SHAPES, rows or ROWS, ranks or RANKS, (False, True))]
        total = 2 * len(cases)
        for number, result in enumerate(tuned(cases, getattr(torch, dtype)), 1):
            against = result.seconds.get(FLOOR) or next(iter(result.seconds.values()))
            gain = against / result.seconds[result.form]
            print(f"{number}/{total}  {result.key}: skinny {result.form.skinny}, base {result.form.base}, {gain:.2f} times the "
                  f"{'addmm form' if FLOOR in result.seconds else 'cuBLAS base'}", flush=True)
        written = own_tables() / f"{device_key(torch.cuda.get_device_name())}.json"
        print(f"written to {written}; every later run reads it")
    return written

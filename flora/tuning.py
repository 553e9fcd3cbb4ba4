"""`flora tune`: measures on this GPU which form of the kernels is fastest for each shape, and keeps the table for later runs."""
import argparse
import itertools

from flora.errors import BackendError

# (out, in) of the linears of SmolLM2-135M and of Llama layers of 1B, 3B, 7B and 70B.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048), (2048, 8192), (3072, 3072), (8192, 3072), (3072, 8192),
          (4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672))


def _shape(text: str) -> tuple[int, int]:
    """"4096x11008" as (4096, 11008)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected out x in, such as 4096x11008; got {text!r}")
    return int(parts[0]), int(parts[1])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got {text!r}")
    return int(text)


def main(arguments: list[str]) -> None:
    """Raises BackendError where there is no GPU or no Triton."""
    parser = argparse.ArgumentParser(prog="flora tune", description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="OUTxIN", help="linears, as out x in")
    parser.add_argument("--rows", nargs="+", type=_positive, default=(512, 2048, 8192, 32768), help="rows of x: tokens of a batch")
    parser.add_argument("--ranks", nargs="+", type=_positive, default=(4, 16, 64, 256),
                        help="ranks of an adapter: of one client, where there are ten")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)

    import torch

    from flora import kernels
    if not torch.cuda.is_available():
        raise BackendError("expected an NVIDIA GPU to measure on; found none. Nothing has to be tuned for the CPU.")
    with kernels.use("triton"):
        from flora.kernels.triton.rule import FLOOR, device_key, own_tables
        from flora.kernels.triton.tune import Shape, tune

        shapes = [Shape(rows, *shape, ranks, clients) for shape, rows, ranks, clients in
                  itertools.product(options.shapes, options.rows, options.ranks, (False, True))]
        total = 2 * len(shapes)
        for number, result in enumerate(tune(shapes, getattr(torch, options.dtype)), 1):
            against = result.seconds.get(FLOOR) or next(iter(result.seconds.values()))
            gain = against / result.seconds[result.form]
            print(f"{number}/{total}  {result.key}: skinny {result.form.skinny}, base {result.form.base}, {gain:.2f} times the "
                  f"{'addmm form' if FLOOR in result.seconds else 'cuBLAS base'}", flush=True)
        print(f"written to {own_tables() / device_key(torch.cuda.get_device_name())}.json; every later run reads it")

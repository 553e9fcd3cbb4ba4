"""The seven linears of a decoder layer, forward and forward + backward: flora, its peers, and the bare products.

    python -m benchmarks.bench_lora_linear [--models 7B ...] [--rows 8192 ...] [--ranks 16 ...] [--dtypes bf16 ...]

Kinds of call: one adapter; a stack of ten on all rows; the downlink of ten clients of rank 64, on all rows; ten clients with the
ranks of the FLoRA paper. The limit is this machine's roofline of the same split: the larger of operations over its measured peak
and bytes over its copy bandwidth.
"""
import argparse
import itertools

import torch

from benchmarks.gate import require_green
from benchmarks.measure import publish
from benchmarks.shapes import MODELS, RANKS
from benchmarks.variants import READS, DecoderLinears, variants
from flora.speed import copy_bandwidth, interleaved, matmul_peak, on_the_card, roofline, rows_of

KINDS = {"one": [], "stack": RANKS, "downlink": [64] * 10, "clients": RANKS}       # the ranks of a kind
BOTH = "forward + backward"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def title(model: str, num_rows: int, kind: str, ranks: list[int], dtype: str, what: str) -> str:
    """The name of a case in the tables."""
    return f"{model}, {num_rows} rows, {kind}, rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}, {dtype}, {what}"


def measure(kind: str, model: str, num_rows: int, ranks: list[int], name: str, device: str, compiled: bool,
            limits: tuple, repeats: int) -> list:
    """The rows of one case, forward alone and with the backward pass."""
    torch._dynamo.reset()                                               # its limit of compiled versions is per function
    dtype, shapes, rows = DTYPES[name], MODELS[model], []
    widths = {READS[layer]: n_in for layer, _, n_in in shapes}
    inputs = [torch.randn(num_rows, widths[i], dtype=dtype, device=device, requires_grad=True) for i in sorted(widths)]
    grads = [torch.randn(num_rows, n_out, dtype=dtype, device=device) for _, n_out, _ in shapes]

    def forward(layers: DecoderLinears) -> None:
        with torch.no_grad():
            layers(inputs)

    def both(layers: DecoderLinears) -> None:
        torch.autograd.backward(layers(inputs), grads)
        for parameter in (*layers.parameters(), *inputs):
            parameter.grad = None

    found = variants(kind, shapes, ranks, num_rows, dtype, device, compiled)
    against = "peft" if "peft" in found else "flora, one adapter of rank 16"
    for what, call in (("forward", forward), (BOTH, both)):
        calls = {variant: (lambda c=call, m=layers: c(m)) for variant, layers in found.items()}
        seconds, card = interleaved(calls, repeats), on_the_card(calls, repeats)
        used = max(ranks) if kind == "clients" else sum(ranks)
        limit = roofline(shapes, num_rows, used, dtype.itemsize, limits[name], backward=call is both)
        timed = rows_of(title(model, num_rows, kind, ranks, name, what), seconds, against, limit)
        rows += [row | {"card_ms": card.get(row["variant"])} for row in timed]
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7B", "1B", "70B", "3B"] if gpu else ["SmolLM2-135M"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 512, 2048, 32768] if gpu else [256, 2048])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 4, 64, 256] if gpu else [16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"] if gpu else ["fp32", "bf16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["one", "stack", "clients"])
    parser.add_argument("--allocator", choices=["default", "raised"], default="raised",
                        help="raised: the C allocator keeps large blocks (flora._host.tune_allocator), for every variant alike")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the formula and of PEFT's layers too")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    require_green("tests/test_ops.py")
    if options.allocator == "raised" and not gpu:
        from flora import _host
        _host.tune_allocator()
    device = "cuda" if gpu else "cpu"
    limits = {name: (matmul_peak(DTYPES[name], device), copy_bandwidth(device)) for name in options.dtypes}
    cases = [("one adapter", [rank]) for rank in options.ranks] if "one" in options.kinds else []
    cases += [(kind, KINDS[kind]) for kind in KINDS if kind in options.kinds and kind != "one"]
    file = "lora_linear" if options.allocator == "raised" else "lora_linear_default_allocator"
    for num_rows, model, name, (kind, ranks) in itertools.product(options.rows, options.models, options.dtypes, cases):
        publish(file, measure(kind, model, num_rows, ranks, name, device, options.compile, limits, options.repeats))


if __name__ == "__main__":
    main()

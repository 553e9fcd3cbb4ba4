"""LoRA on a 4-bit base: the seven linears of a decoder layer in bitsandbytes' NF4, by flora's lora_add_ and by PEFT.

    python -m benchmarks.bench_qlora [--models 7B ...] [--rows 8192 ...] [--rank 16]

Both leave the base product to bitsandbytes; "bitsandbytes alone" is that product and its gradient without LoRA. Adapters are of the
compute dtype, bf16; PEFT's default, fp32 ones, is measured too. extra MB: what a forward and backward pass holds at its peak.
Needs bitsandbytes (pip install bitsandbytes).
"""
import argparse
import itertools
import sys

import torch
from torch import nn

from benchmarks.bench_merge import extra_megabytes
from benchmarks.clients import device
from benchmarks.gate import require_green
from benchmarks.measure import publish
from benchmarks.shapes import MODELS, READS
from benchmarks.variants import DecoderLinears, replaced, with_flora, with_peft
from flora.speed import interleaved, rows_of

COMPUTE = torch.bfloat16


def quantised(shapes: list[tuple[str, int, int]]) -> nn.Module:
    """A decoder layer's linears in NF4, computing in bf16."""
    import bitsandbytes

    def one(base: nn.Linear) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(base.in_features, base.out_features, bias=False, compute_dtype=COMPUTE, quant_type="nf4")
        layer.load_state_dict({"weight": base.weight.cpu()})
        return layer.to(device())

    model = replaced(DecoderLinears(shapes, COMPUTE, device()), one)
    model.is_loaded_in_4bit = True                                      # what PEFT looks for
    return model.requires_grad_(False)


def measure(model: str, num_rows: int, rank: int, repeats: int) -> list[dict]:
    """The rows of one case. Leaves with a message where flora's y and PEFT's differ."""
    shapes = MODELS[model]
    widths = {READS[name]: n_in for name, _, n_in in shapes}
    inputs = [torch.randn(num_rows, widths[i], dtype=COMPUTE, device=device(), requires_grad=True) for i in sorted(widths)]
    grads = [torch.randn(num_rows, n_out, dtype=COMPUTE, device=device()) for _, n_out, _ in shapes]
    peft = "PEFT + bitsandbytes"
    found = {"flora": with_flora(quantised(shapes), [rank], None, COMPUTE), peft: with_peft(quantised(shapes), [rank], COMPUTE),
             f"{peft}, fp32 adapters (its default)": with_peft(quantised(shapes), [rank], torch.float32),
             "bitsandbytes alone": quantised(shapes)}
    same(found["flora"], found[peft], inputs)

    def both(layers: nn.Module) -> None:
        torch.autograd.backward(layers(inputs), grads)
        for parameter in (*layers.parameters(), *inputs):
            parameter.grad = None

    calls = {name: lambda layers=layers: both(layers) for name, layers in found.items()}
    for call in calls.values():
        call()
    extra = {name: extra_megabytes(call, device()) for name, call in calls.items()}
    case = f"{model} in NF4, {num_rows} rows, rank {rank}, bf16, forward + backward"
    return [row | {"extra_mb": extra[row["variant"]]} for row in rows_of(case, interleaved(calls, repeats), peft)]


@torch.no_grad()
def same(ours: nn.Module, theirs: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Gives both the same factors, and compares what they compute."""
    for name in READS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        other.lora_A["adapter0"].weight.copy_(mine.A)
        other.lora_B["adapter0"].weight.copy_(mine.B)
    for name, a, b in zip(READS, ours(inputs), theirs(inputs), strict=True):
        apart = float((a - b).float().norm() / b.float().norm())
        if not apart < 1e-2:
            sys.exit(f"{name}: flora's y is {apart:.1e} from PEFT's, relative; expected less than 1e-2. Nothing is measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7B", "70B", "1B"] if gpu else ["SmolLM2-135M"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 2048] if gpu else [256])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        sys.exit(f"expected bitsandbytes; got {error}. pip install bitsandbytes")
    require_green("tests/test_ops.py")
    for num_rows, model in itertools.product(options.rows, options.models):
        publish("qlora", measure(model, num_rows, options.rank, options.repeats))


if __name__ == "__main__":
    main()

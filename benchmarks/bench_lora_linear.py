"""Forward and backward of the seven linears of SmolLM2-135M: flora's operator, PEFT's layer, the addmm form, the bare products.

The limit is the bare products (frozen weight, dx only): what a LoRA layer would cost if the adapters were free.
"""
import sys

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.gate import require_green
from benchmarks.measure import interleaved, publish, rows_of
from benchmarks.shapes import SMOLLM2_135M
from flora import nn as flora_nn


def tree() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(n_in, n_out, bias=False) for name, n_out, n_in in SMOLLM2_135M}).requires_grad_(False)


class AddmmLinear(nn.Module):
    """The floor: y = x Wᵀ, then addmm_ of the two skinny products; autograd derives the backward."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base, self.scale = base, 2.0
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.B = nn.Parameter(torch.randn(base.out_features, rank) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.base(x), x @ self.A.T, self.B.T, alpha=self.scale)


def variants(rank: int) -> dict[str, nn.ModuleDict]:
    targets = [name for name, _, _ in SMOLLM2_135M]
    peft = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0), tree())
    addmm = nn.ModuleDict({name: AddmmLinear(layer, rank) for name, layer in tree().items()})
    return {"flora": flora_nn.attach(tree(), rank=rank, alpha=2 * rank), "peft": peft, "addmm form": addmm, "bare products": tree()}


def main() -> None:
    require_green("tests/test_ops.py")
    rows = []
    for num_rows in (int(value) for value in sys.argv[1:] or (256, 2048)):
        for rank in (8, 64):
            inputs = {name: torch.randn(num_rows, n_in, requires_grad=True) for name, _, n_in in SMOLLM2_135M}
            grads = {name: torch.randn(num_rows, n_out) for name, n_out, _ in SMOLLM2_135M}

            def step(layers: nn.ModuleDict, inputs: dict = inputs, grads: dict = grads) -> None:
                for name, layer in layers.items():
                    layer(inputs[name]).backward(grads[name])

            models = variants(rank)
            seconds = interleaved({name: (lambda m=model: step(m)) for name, model in models.items()})
            limit = sorted(seconds["bare products"])[len(seconds["bare products"]) // 2]
            rows += rows_of(f"{num_rows} rows, rank {rank}, fp32", seconds, "peft", limit)
    publish("lora_linear", rows, "peft")


if __name__ == "__main__":
    main()

"""The seven linears of a decoder layer with LoRA, by flora and by every peer: what bench_lora_linear lets take turns.

q, k and v read one tensor, gate and up another, as in the model; what each variant makes of that is its own.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

import flora
from benchmarks.ideas import ideas, unsloth
from benchmarks.shapes import READS
from flora import ops
from flora.layer import LoRALinear

Shapes = list[tuple[str, int, int]]


class DecoderLinears(nn.Module):
    """The linears of a decoder layer, frozen, without what lies between them."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str):
        super().__init__()
        torch.manual_seed(0)
        for name, n_out, n_in in shapes:
            self.add_module(name, nn.Linear(n_in, n_out, bias=False, dtype=dtype, device=device).requires_grad_(False))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(inputs[READS[name]]) for name, layer in self.named_children()]


class AddmmLinear(nn.Module):
    """The floor: y = x Wᵀ, then addmm_ of the two skinny products for each of its parts; autograd derives the backward pass."""

    def __init__(self, base: nn.Linear, ranks: list[int], rows: list[int] | None, dtype: torch.dtype):
        super().__init__()
        self.base, self.scale, self.rows = base, 2.0, rows
        new = {"dtype": dtype, "device": base.weight.device}
        self.As = nn.ParameterList(torch.randn(r, base.in_features, **new) * 0.02 for r in ranks)
        self.Bs = nn.ParameterList(torch.randn(base.out_features, r, **new) * 0.02 for r in ranks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.rows is None:
            return y.addmm_(x @ self.As[0].T, self.Bs[0].T, alpha=self.scale)
        first = 0
        for count, A, B in zip(self.rows, self.As, self.Bs, strict=True):
            y[first:first + count].addmm_(x[first:first + count] @ A.T, B.T, alpha=self.scale)
            first += count
        return y


class CompiledLinear(nn.Module):
    """The formula as one writes it, under torch.compile."""

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype):
        super().__init__()
        self.base = base
        new = {"dtype": dtype, "device": base.weight.device}
        self.A, self.B = (nn.Parameter(torch.randn(*s, **new) * 0.02)
                          for s in ((rank, base.in_features), (base.out_features, rank)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.A.T) * 2.0) @ self.B.T


def replaced(model: DecoderLinears, make: Callable[[nn.Linear], nn.Module]) -> DecoderLinears:
    for name, layer in list(model.named_children()):
        setattr(model, name, make(layer))
    return model


def with_peft(model: DecoderLinears, ranks: list[int], dtype: torch.dtype) -> DecoderLinears:
    """PEFT's layers, one adapter of each rank, all active."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = [f"adapter{k}" for k in range(len(ranks))]
    for name, rank in zip(names, ranks, strict=True):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(READS), lora_dropout=0.0)
        model = inject_adapter_in_model(config, model, adapter_name=name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    return model


def with_flora(model: DecoderLinears, ranks: list[int], rows: list[int] | None, dtype: torch.dtype) -> DecoderLinears:
    """flora's layers: one adapter of all ranks, or (rows given) a client for each rank."""
    flora.attach(model, rank=sum(ranks), alpha=2 * sum(ranks), dtype=dtype)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.B, std=0.02)
            if rows is not None:
                offsets = ([sum(some[:k]) for k in range(len(some) + 1)] for some in (rows, ranks))
                layer.routing.segments = layer.routing.segments or ops.Segments(*offsets)
    return model


def variants(kind: str, shapes: Shapes, ranks: list[int], num_rows: int, dtype: torch.dtype, device: str,
             compiled: bool) -> dict[str, nn.Module]:
    """Every variant of a kind of call: "one adapter", "stack" (all ranks on all rows) or "clients" (each its own rows)."""
    def new() -> DecoderLinears:
        return DecoderLinears(shapes, dtype, device)

    if kind == "clients":
        rows = [num_rows * (k + 1) // len(ranks) - num_rows * k // len(ranks) for k in range(len(ranks))]
        return {"flora": with_flora(new(), ranks, rows, dtype),
                "flora, one adapter of rank 16": with_flora(new(), [16], None, dtype),
                "addmm_ form, client by client": replaced(new(), lambda base: AddmmLinear(base, ranks, rows, dtype)),
                "bare products": new()}
    total = [sum(ranks)]
    found = {"flora": with_flora(new(), ranks, None, dtype), "peft": with_peft(new(), ranks, dtype)}
    if dtype != torch.float32:
        found["peft, fp32 adapters (its default)"] = with_peft(new(), ranks, torch.float32)
    if compiled:
        found["peft, torch.compile"] = torch.compile(with_peft(new(), ranks, dtype))
        found["the formula, torch.compile"] = replaced(new(), lambda base: torch.compile(CompiledLinear(base, total[0], dtype)))
    found["addmm_ form"] = replaced(new(), lambda base: AddmmLinear(base, total, None, dtype))
    found["Unsloth's calls, written plainly"] = unsloth(new(), total[0], dtype)
    if device == "cuda":
        found |= ideas(new, total[0], dtype)
    return {**found, "bare products": new()}

"""What bench_lora_linear compares computes the same: y, dx and every gradient of every variant, by the error rule."""
import torch
from oracles import check
from torch import nn

from benchmarks.ideas import HOW, Grouped, ideas
from benchmarks.shapes import READS, decoder
from benchmarks.variants import AddmmLinear, DecoderLinears, replaced, variants
from flora.layer import LoRALinear

SHAPES, M, RANK = decoder(64, 32, 176), 48, 16


class Dense(nn.Module):
    """x (W + 2 B A)ᵀ, the ΔW formed: the oracle."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A, self.B = (nn.Parameter(torch.empty(s, dtype=torch.float64)) for s in ((RANK, base.in_features),
                                                                                      (base.out_features, RANK)))

    def forward(self, x):
        return x @ (self.base.weight + 2.0 * self.B @ self.A).T


def factors(model):
    """[(A, B)] of the seven linears of a variant; empty for the bare products."""
    if isinstance(model, Grouped):
        return list(zip(model.As, model.Bs, strict=True))
    layers = [layer for _, layer in model.named_children()]
    if isinstance(layers[0], (LoRALinear, Dense)):
        return [(layer.A, layer.B) for layer in layers]
    if isinstance(layers[0], AddmmLinear):
        return [(layer.As[0], layer.Bs[0]) for layer in layers]
    return [(layer.lora_A["adapter0"].weight, layer.lora_B["adapter0"].weight) for layer in layers if hasattr(layer, "lora_A")]


def passes(model, given, inputs, grads):
    """y of every linear, dx of every input, dA and dB of every linear."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for own, values in zip(factors(model), given, strict=True):
            for parameter, value in zip(own, values, strict=True):
                parameter.copy_(value)
    model.zero_grad()
    xs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    ys = model(xs)
    torch.autograd.backward(ys, [g.to(dtype) for g in grads])
    return [y.detach() for y in ys] + [x.grad for x in xs] + [t.grad for pair in factors(model) for t in pair]


def test_all_variants_are_one_function():
    def new(dtype=torch.float32):
        return DecoderLinears(SHAPES, dtype, "cpu")

    found = variants("one adapter", SHAPES, [RANK], M, torch.float32, "cpu", False) | ideas(new, RANK, torch.float32)
    assert set(found) == {"flora", "peft", "addmm_ form", "Unsloth's calls, written plainly", "bare products",
                          *(f"idea: {how}" for how in HOW)}
    widths = {READS[name]: n_in for name, _, n_in in SHAPES}
    inputs = [torch.randn(M, widths[i]) for i in sorted(widths)]
    grads = [torch.randn(M, n_out) for _, n_out, _ in SHAPES]
    given = [(torch.randn(RANK, n_in) * 0.1, torch.randn(n_out, RANK) * 0.1) for _, n_out, n_in in SHAPES]
    exact = passes(replaced(new().double(), Dense), given, inputs, grads)
    plain = passes(found["addmm_ form"], given, inputs, grads)
    for name, model in found.items():
        if name != "bare products":
            for got, usual, true in zip(passes(model, given, inputs, grads), plain, exact, strict=True):
                check(got, usual, true, what=name)

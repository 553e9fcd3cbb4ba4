"""Tiny PEFT models whose adapters are not zero, one forward and backward pass of them, and what called flora's operator."""
import copy

import pytest
import torch
from oracles import gpt2, llama, tokens
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed: nothing of its layers or adapters was tested")
MODELS = {"llama": llama, "gpt2": gpt2}
LAYERS = {"llama": 14, "gpt2": 8}


def fill(model, size=0.3, seed=1):
    """Random numbers in every B (and in DoRA's and the bias's place), the same ones always."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * size)
    return model


def config(**changes):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def model_of(make=llama, dtype=torch.float32, upcast=True, **changes):
    """A PEFT model with a filled adapter, the same one for the same arguments."""
    torch.manual_seed(0)
    base = make(dtype)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):                                      # which transformers makes of zeros
            parameter.data.normal_(std=0.3)
    return fill(peft.get_peft_model(base, config(**changes), autocast_adapter_dtype=upcast))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def trained(model):
    """The parameters that train, by name."""
    return {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad}


def passes(model, seed=0):
    """Logits and the gradient of every parameter that trains, of one pass; dropout from this seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    return {"logits": out.logits.detach(), **{name: p.grad.clone() for name, p in trained(model).items()}}


def in_double(model):
    """A copy in fp64: what is exact."""
    return copy.deepcopy(model).double()


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


class Doubled(nn.Linear):
    """A forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)

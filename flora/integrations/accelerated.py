"""PEFT's LoRA layers computed by flora's operator, in place: a layer's class changes, and nothing else does.

Parameters, their names, buffers, hooks and the state dict are PEFT's own, since they are the same objects; so an optimiser that
was made before, a checkpoint and a Trainer notice nothing. The class is a subclass of PEFT's Linear that looks, at every call,
whether this call is plain LoRA of one adapter on a plain weight. If so, base product and LoRA path are one operator; if not
(several adapters, a batch of mixed ones, merged, disabled, DoRA and other variants, quantised or hooked bases, ...), PEFT's
forward runs.

Dropout is PEFT's own module: it draws the mask that it would have drawn, and the LoRA path is added to the base product.
Factors are cast to the dtype of the activations for the products, where PEFT casts the activations to the factors' (fp32 unless
autocast_adapter_dtype=False); sums are fp32. Gradients come in the factors' dtype. Differentiable once.
"""
import warnings
from functools import lru_cache
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from flora import ops
from flora.errors import TargetError
from flora.layer import computes_itself, is_linear, matrix


class AcceleratedLinear(Linear):
    """PEFT's Linear, its forward in one operator where obstacle() finds none. Made by accelerate, never constructed."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args or kwargs or type(x) is not Tensor or obstacle(self) or _special(x, self.base_layer.weight):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        name = next(name for name in self.active_adapters if name in self.lora_A)
        A, B, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        scale = _scale(float(self.scaling[name]), A)
        if dropout.training and isinstance(dropout, nn.Dropout):
            return ops.lora_add_(self.base_layer(x), dropout(self._cast_input_dtype(x, A.dtype)), A, B, scale)
        return ops.lora_linear(x, matrix(self.base_layer), A, B, scale, self.base_layer.bias)


def _special(x: Tensor, weight: Tensor) -> bool:
    """Whether a call is one that the operator does not take and PEFT may: functorch, forward-mode, dtypes that do not match."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return True
    return not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _scale(value: float, A: Tensor) -> Tensor:
    """alpha / r as a vector: one for all layers alike, made once, or a node where a graph is traced."""
    if torch.compiler.is_compiling():
        return torch.full((A.shape[0],), value, device=A.device)
    return _kept_scale(value, A.shape[0], A.device)


@lru_cache(256)
def _kept_scale(value: float, rank: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):                           # a layer that first runs in inference mode trains later
        return torch.full((rank,), value, device=device, dtype=torch.float32)


def obstacle(layer: Linear) -> str:
    """Why PEFT's own forward computes this layer as things stand; "" where flora's operator does."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "an adapter is merged into its base"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return "several adapters are active" if names else "no active adapter has this layer"
    if names[0] in layer.lora_variant:
        return f"it is a variant of LoRA ({type(layer.lora_variant[names[0]]).__name__})"
    return _of_factors(layer, names[0]) or _of_base(layer.base_layer)


def _of_factors(layer: Linear, name: str) -> str:
    """What stands in the way on the adapter's side."""
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not (type(A) is type(B) is nn.Linear) or A.weight.dtype not in ops.FLOATS or B.weight.dtype not in ops.FLOATS:
        return f"its factors are not plain linear layers ({type(A).__name__}, {type(B).__name__})"
    if A.bias is not None or B.bias is not None:
        return "lora_bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(dropout).__name__}"
    if not layer.cast_input_dtype_enabled:
        return "casting of its input is disabled"
    if any(_hooked(module) for module in (A, B, dropout)):
        return "its factors have hooks"
    return "" if isinstance(layer.scaling[name], (int, float)) else "its scaling is not a number"


def _of_base(base: nn.Module) -> str:
    """What stands in the way on the base's side."""
    if not is_linear(base):
        return f"its base is a {type(base).__name__}"
    if computes_itself(base) or _hooked(base):
        return "its base has hooks or a forward of its own"
    if parametrize.is_parametrized(base):
        return "its base weight is computed (torch.nn.utils.parametrize)"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its base trains too"
    return ""


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or "forward" in module.__dict__)


def _layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """PEFT's layers by the names that they have in the base model."""
    return {name.removeprefix("base_model.model."): module for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)}


def fallbacks(peft_model: nn.Module) -> dict[str, str]:
    """Why PEFT's own code computes a layer as things stand, by layer name; layers that flora computes are not in it.

    It changes as adapters are switched, merged or disabled. A call with adapter_names (a mixed batch) is always PEFT's.
    """
    found = {}
    for name, layer in _layers(peft_model).items():
        if isinstance(layer, AcceleratedLinear):
            why = "its forward was replaced on the instance" if "forward" in layer.__dict__ else obstacle(layer)
        elif type(layer) is Linear:
            why = "it is not accelerated: flora.integrations.peft.accelerate(model) does it"
        else:
            kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
            why = f"it is a {kind}, not PEFT's LoRA of a linear"
        if why:
            found[name] = why
    return found


def accelerate(peft_model: nn.Module) -> nn.Module:
    """Lets flora's operator compute PEFT's linear LoRA layers, in place; returns the model. Again after layers were added.

    A model of get_peft_model, PeftModel.from_pretrained, inject_adapter_in_model or transformers' add_adapter, trained or not.
    Adapters may be added, switched, merged, saved and deleted as before. Warns of layers that PEFT computes all the same, with the
    reasons (fallbacks gives them at any time). Raises TargetError for a model without PEFT's LoRA layers.
    """
    layers = [layer for layer in _layers(peft_model).values() if isinstance(layer, LoraLayer)]
    if not layers:
        raise TargetError("expected a model with PEFT's LoRA layers; found none. Make it with peft.get_peft_model(model, "
                          "LoraConfig(...)), or use flora.attach on the plain model.")
    for layer in layers:
        if type(layer) is Linear:
            layer.__class__ = AcceleratedLinear
    reasons: dict[str, list[str]] = {}
    for name, why in fallbacks(peft_model).items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        said = "; ".join(f"{why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
                         for why, names in reasons.items())
        warnings.warn(f"{sum(map(len, reasons.values()))} of {len(_layers(peft_model))} layers are computed by PEFT's own code: "
                      f"{said}", stacklevel=2)
    return peft_model


def restore(peft_model: nn.Module) -> nn.Module:
    """Undoes accelerate, in place: every layer is PEFT's own again. Returns the model."""
    for layer in _layers(peft_model).values():
        if type(layer) is AcceleratedLinear:
            layer.__class__ = Linear
    return peft_model

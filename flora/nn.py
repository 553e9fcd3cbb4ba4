"""The verbs on a model: attach, adapters, load_adapters, merge, detach; which of its modules can carry an adapter."""
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from flora import ops
from flora.adapter import Adapter, Adapters
from flora.errors import TargetError
from flora.layer import LoRALinear, Routing, SharedInput, is_linear, is_opaque, matrix, shape_of

# Names under which architectures keep linear layers that read the same tensor.
READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
                 ("wq", "wk", "wv"), ("w1", "w3"))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The attached layers by qualified name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that could carry an adapter, or does, by the qualified name that it has without one."""
    carried = {layer.base: name for name, layer in lora_layers(model).items()}
    return {carried.get(m, name): m for name, m in model.named_modules() if is_linear(m) or is_opaque(m)}


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output embedding and the classification heads: what "all-linear" leaves out, as PEFT does."""
    get = getattr(model, "get_output_embeddings", None)
    heads = [get()] if callable(get) else []
    return heads + [m for n, m in model.named_modules() if n in ("score", "classifier") and callable(get)]


def _layer_index(name: str) -> int | None:
    return int(found[1]) if (found := re.search(r"(?:^|\.)(\d+)\.", name)) else None


def target_shapes(model: nn.Module, targets: str | Sequence[str] = "all-linear",
                  layers: Sequence[int] | None = None) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that attach would give an adapter, by qualified name.

    targets: "all-linear", or module names or their last parts ("q_proj"); layers: only blocks with these indices.
    Raises TargetError where nothing, or one of the names, matches; it lists what exists.
    """
    linears = _linears(model)
    exist = ", ".join(sorted({name.split(".")[-1] for name in linears})) or "none"
    if targets == "all-linear":
        heads = _heads(model)
        chosen = {name: m for name, m in linears.items() if not any(m is head for head in heads)}
    else:
        wanted = (targets,) if isinstance(targets, str) else tuple(targets)
        for target in wanted:
            if not any(name == target or name.endswith("." + target) for name in linears):
                raise TargetError(f"no linear module is named {target!r}; this model has: {exist}. Name some of these, or "
                                  'use "all-linear".')
        chosen = {name: m for name, m in linears.items() if any(name == t or name.endswith("." + t) for t in wanted)}
    if layers is not None:
        chosen = {name: m for name, m in chosen.items() if _layer_index(name) in set(layers)}
    if not chosen:
        raise TargetError(f"expected at least one layer for targets={targets!r}, layers={layers}; found none. "
                          f"Linear modules of this model: {exist}; blocks: "
                          f"{sorted({i for n in linears if (i := _layer_index(n)) is not None})}.")
    _refuse_tied(model, chosen)
    return {name: shape_of(module) for name, module in chosen.items()}


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raises TargetError where a chosen module shares its weight with another module: a merge into one would change both."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        others = [n for n in owners.get(id(getattr(module, "weight", None)), ()) if n not in (name, f"{name}.base")]
        if others:
            raise TargetError(f"{name} shares its weight with {', '.join(others)}: an adapter merged into one would change "
                              "both. Leave it out of targets, or untie the weights first (give one a copy, and set "
                              "config.tie_word_embeddings = False).")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts new where old is, under every parent: a shared module has several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def attach(model: nn.Module, rank: int = 16, alpha: float = 32, targets: str | Sequence[str] = "all-linear",
           dropout: float = 0.0, dtype: torch.dtype | None = None, layers: Sequence[int] | None = None) -> nn.Module:
    """Gives every target layer a fresh adapter and freezes everything else. Changes the model in place and returns it.

    alpha: the user's number; scale = alpha / rank. targets, layers: see target_shapes. dtype of A and B: fp32 unless given.
    Raises TargetError where nothing matches, a target is tied, or adapters are attached already; AdapterError for a rank < 1.
    """
    if lora_layers(model):
        raise TargetError("adapters are attached to this model already. Call flora.detach(model) first.")
    names = target_shapes(model, targets, layers)
    if "" in names:
        raise TargetError("the model is itself one linear module, which cannot be replaced inside itself. Use "
                          "flora.LoRALinear(module), or wrap it in nn.Sequential.")
    _wrap(model, {name: LoRALinear(model.get_submodule(name), rank, alpha, dropout, dtype) for name in names})
    return model


def _wrap(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Puts the layers in the place of their bases and freezes everything else; remembers what trained."""
    for name in layers:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise TargetError(f"{name}: nn.TransformerEncoderLayer reads this weight past an adapter in eval mode. Leave it out.")
    model._flora_required_grad = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    routing = Routing()
    for name, layer in layers.items():
        layer.name, layer.routing = name, routing
        layer.train(layer.base.training)
        _replace(model, layer.base, layer)
    for parent in model.modules():
        for names in READ_THE_SAME:
            found = dict.fromkeys(parent._modules.get(name) for name in names)
            siblings = [m for m in found if isinstance(m, LoRALinear) and not m.opaque and m.shared is None]
            if len(siblings) > 1 and len({m.in_features for m in siblings}) == 1:
                SharedInput(parent, siblings)


@contextlib.contextmanager
def applied(model: nn.Module, adapters: Adapters, dropout: float = 0.0) -> Iterator[dict[str, LoRALinear]]:
    """The model with exactly these adapters attached while the block runs, whatever their ranks and layers; then detached.

    Gives the attached layers by name. Raises TargetError for layers that do not exist or do not fit.
    """
    if lora_layers(model):
        raise TargetError("adapters are attached to this model already. Call flora.detach(model) first.")
    layers = {}
    for name, base in _bases(model, adapters).items():
        layers[name] = LoRALinear(base, adapters[name].rank, dropout=dropout)
        layers[name].load(adapters[name])
    try:
        _wrap(model, layers)
        yield layers
    finally:
        detach(model)


def detach(model: nn.Module) -> nn.Module:
    """Puts the original modules back and lets train what trained before attach. The base is as it was; adapters are dropped."""
    for layer in lora_layers(model).values():
        if layer.shared is not None:
            layer.shared.part()
        _replace(model, layer, layer.base)
    for parameter in model.__dict__.pop("_flora_required_grad", []):
        parameter.requires_grad_(True)
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by qualified layer name: detached copies. Raises TargetError where none are attached."""
    layers = lora_layers(model)
    if not layers:
        raise TargetError("no adapters are attached to this model. Call flora.attach(model) first.")
    return {name: layer.adapter for name, layer in layers.items()}


def load_adapters(model: nn.Module, adapters: Adapters) -> nn.Module:
    """Writes adapters, of any ranks, into the attached layers. Checks all of them before it writes one.

    Raises TargetError where the layers are not those attached, or a shape is not its layer's.
    """
    layers = lora_layers(model)
    if set(layers) != set(adapters):
        raise TargetError(f"expected adapters for the {len(layers)} attached layers; got {len(adapters)}. Without an adapter: "
                          f"{sorted(set(layers) - set(adapters))[:5]}; not attached: {sorted(set(adapters) - set(layers))[:5]}.")
    for name, layer in layers.items():
        _check_shape(name, adapters[name], (layer.out_features, layer.in_features))
    for name, layer in layers.items():
        layer.load(adapters[name])
    return model


def _check_shape(name: str, adapter: Adapter, shape: tuple[int, int]) -> None:
    if adapter.shape != shape:
        raise TargetError(f"{name}: expected an adapter for (out, in) = {shape}; got {adapter.shape}, of another model")


def _bases(model: nn.Module, adapters: Adapters) -> dict[str, nn.Module]:
    """The linear module of every adapter, checked: it exists, fits, and shares its weight with no other module."""
    linears, bases = _linears(model), {}
    for name, adapter in adapters.items():
        base = bases[name] = linears.get(name)
        if base is None:
            raise TargetError(f"expected a linear module named {name!r} in the model; got none. Was the adapter made for another "
                              "model?")
        _check_shape(name, adapter, shape_of(base))
    _refuse_tied(model, bases)
    return bases


def merge(model: nn.Module, adapters: Adapters) -> nn.Module:
    """W += B diag(scale) A for every layer named, in place, one pass over each weight. Adapters attached stay as they are.

    Checks every name and shape before it writes one weight, so a refused merge leaves the model as it was.
    Raises TargetError for a layer that does not exist, does not fit, is quantised, or shares its weight with another module.
    """
    bases = _bases(model, adapters)
    for name, base in bases.items():
        if is_opaque(base):
            raise TargetError(f"{name}: expected a weight in floating point to merge into; got a {type(base).__name__}, whose own "
                              "is packed. Keep the adapter attached, or load the model in floating point.")
    with torch.no_grad():
        for name, base in bases.items():
            weight = matrix(base)
            adapter = adapters[name].to(weight.device)
            ops.merge_(weight, adapter.A, adapter.B, adapter.scale)
    return model

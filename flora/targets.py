"""Which modules of a model can carry an adapter, by name: what attach, merge and the cohort ask first."""
import re
from collections.abc import Iterable, Sequence

from torch import nn

from flora.adapter import Adapter, Adapters
from flora.errors import TargetError
from flora.layer import Accumulated, LoRALinear, is_linear, is_opaque, refuse_parametrized, shape_of


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The attached layers by qualified name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that could carry an adapter, or does, by the qualified name that it has without one."""
    carried = {layer.base: name for name, layer in lora_layers(model).items()}
    inside = {m.base for m in model.modules() if isinstance(m, Accumulated)}
    return {carried.get(m, name): m for name, m in model.named_modules() if m not in inside and (is_linear(m) or is_opaque(m))}


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output embedding and the classification heads: what "all-linear" leaves out, as PEFT does."""
    get = getattr(model, "get_output_embeddings", None)
    heads = [get()] if callable(get) else []
    return heads + [m for n, m in model.named_modules() if n in ("score", "classifier") and callable(get)]


def layer_index(name: str) -> int | None:
    """The index of the block that a module of this name lies in."""
    return int(found[1]) if (found := re.search(r"(?:^|\.)(\d+)\.", name)) else None


def blocks_of(names: Iterable[str]) -> list[int]:
    """The indices of the blocks (transformer layers) that these modules lie in, in order."""
    return sorted({i for name in names if (i := layer_index(name)) is not None})


def target_shapes(model: nn.Module, targets: str | Sequence[str] = "all-linear",
                  layers: Sequence[int] | None = None) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that attach would give an adapter, by qualified name.

    targets: "all-linear", or module names or their last parts ("q_proj"); layers: only blocks with these indices.
    Raises TargetError where nothing, or one of the names, matches; it lists what exists.
    """
    linears = linear_modules(model)
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
        chosen = {name: m for name, m in chosen.items() if layer_index(name) in set(layers)}
    if not chosen:
        raise TargetError(f"expected at least one layer for targets={targets!r}, layers={layers}; found none. "
                          f"Linear modules of this model: {exist}; blocks: "
                          f"{blocks_of(linears)}.")
    refuse_tied(model, chosen)
    for name, module in chosen.items():
        refuse_parametrized(module, name)
    return {name: shape_of(module) for name, module in chosen.items()}


def refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raises TargetError where a chosen module shares its weight with another module: a merge into one would change both."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        own = re.compile(rf"{re.escape(name)}(\.base)*")
        others = [n for n in owners.get(id(getattr(module, "weight", None)), ()) if not own.fullmatch(n)]
        if others:
            raise TargetError(f"{name} shares its weight with {', '.join(others)}: an adapter merged into one would change "
                              "both. Leave it out of targets, or untie the weights first (give one a copy, and set "
                              "config.tie_word_embeddings = False).")


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts new where old is, under every parent: a shared module has several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def check_shape(name: str, adapter: Adapter, shape: tuple[int, int]) -> None:
    if adapter.shape != shape:
        raise TargetError(f"{name}: expected an adapter for (out, in) = {shape}; got {adapter.shape}, of another model")


def bases_of(model: nn.Module, adapters: Adapters, tied: bool = False) -> dict[str, nn.Module]:
    """The linear module of every adapter, checked: it exists, fits, and shares its weight with no other module (unless tied)."""
    linears = linear_modules(model)
    bases: dict[str, nn.Module] = {}
    for name, adapter in adapters.items():
        base = linears.get(name)
        if base is None:
            raise TargetError(f"expected a linear module named {name!r} in the model; got none. Was the adapter made for another "
                              "model?")
        refuse_parametrized(base, name)
        check_shape(name, adapter, shape_of(base))
        bases[name] = base
    if not tied:
        refuse_tied(model, bases)
    return bases

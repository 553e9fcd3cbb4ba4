"""The verbs on a model: attach, adapters, load_adapters, merge, accumulate, detach."""
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from flora import ops
from flora.adapter import Adapter, Adapters, compress, norm, stack
from flora.errors import AdapterError, TargetError
from flora.layer import Accumulated, LoRALinear, Routing, device_for, is_opaque, matrix, overrides, refuse_parametrized
from flora.memory import check_memory_writable
from flora.seeds import derive
from flora.sharded import is_sharded, own_adapters, own_part, put_away
from flora.shared import SharedInput
from flora.targets import bases_of, check_shape, linear_modules, lora_layers, refuse_tied, replace, target_shapes

__all__ = ["attach", "adapters", "load_adapters", "merge", "accumulate", "accumulated", "weights", "load_weights", "residuals",
           "detach", "applied", "lora_layers", "target_shapes"]

# Names under which architectures keep linear layers that read the same tensor.
READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
                 ("wq", "wk", "wv"), ("w1", "w3"))


def attach(model: nn.Module, rank: int = 16, alpha: float = 32, targets: str | Sequence[str] = "all-linear",
           dropout: float = 0.0, dtype: torch.dtype | None = None, layers: Sequence[int] | None = None) -> nn.Module:
    """Gives every target layer a fresh adapter and freezes everything else. Changes the model in place and returns it.

    alpha: the user's number; scale = alpha / rank. dropout: on the input of A. targets, layers: see target_shapes. dtype of A and
    B: fp32 unless given. Raises TargetError where nothing matches, a target is tied, or adapters are attached already; AdapterError
    for a rank < 1.
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
    refuse_read_past(model, layers)
    vars(model)["_flora_required_grad"] = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    routing = Routing()
    for name, layer in layers.items():
        layer.name, layer.routing = name, routing
        layer.train(layer.base.training)
        replace(model, layer.base, layer)
    for parent in model.modules():
        for names in READ_THE_SAME:
            found = dict.fromkeys(parent._modules.get(name) for name in names)
            siblings = [m for m in found if isinstance(m, LoRALinear) and not m.opaque and m.shared is None]
            if len(siblings) > 1 and len({m.in_features for m in siblings}) == 1:
                SharedInput(parent, siblings)


@contextlib.contextmanager
def applied(model: nn.Module, adapters: Adapters, dropout: float = 0.0,
            dtype: torch.dtype | None = None) -> Iterator[dict[str, LoRALinear]]:
    """The model with copies of exactly these adapters attached while the block runs, of any ranks and layers; then detached.

    Gives the attached layers by name. dtype, dropout: as in attach. Raises TargetError for layers that are not there or do not
    fit.
    """
    if lora_layers(model):
        raise TargetError("adapters are attached to this model already. Call flora.detach(model) first.")
    layers = {name: LoRALinear(base, dropout=dropout, dtype=dtype, adapter=adapters[name])
              for name, base in bases_of(model, adapters).items()}
    del adapters                                                # they may be as large as all optimiser states of a round
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
        replace(model, layer, layer.base)
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
        check_shape(name, adapters[name], (layer.out_features, layer.in_features))
    for name, layer in layers.items():
        layer.load(adapters[name])
    return model


def merge(model: nn.Module, adapters: Adapters | Sequence[Adapters], *, rounding: ops.Rounding = "nearest", residual: bool = False,
          seed: int | None = None) -> nn.Module:
    """W += Σ_k B_k diag(scale_k) A_k for every layer named, in place, one pass over each weight. Attached adapters stay.

    adapters: of one party, or a sequence of them (weighted: `adapter * p`), which are summed without being concatenated.
    rounding, seed: as ops.merge_many_; every layer draws from (seed, its name). residual: keep what rounding left of 16-bit
    weights in a bf16 tensor beside each (residuals(model)), so that hundreds of merges do not drift.
    All or nothing. Raises TargetError for a layer that does not exist, does not fit, is quantised, computed or read by a
    forward of its own, or shares its weight with another module; AdapterError for NaN or infinity in an adapter.
    """
    parties = [adapters] if isinstance(adapters, Mapping) else list(adapters)
    bases: dict[str, nn.Module] = {}
    for party in parties:
        bases |= bases_of(model, party)
    parts = {name: [party[name] for party in parties if name in party] for name in bases}
    if put_away(model):
        parts = own_adapters(lambda name: matrix(bases[name]), parts, rounding)
        bases = {name: bases[name] for name in parts}
    groups = list(_groups(model, bases, residual))
    calls = []
    for names, own, _ in groups:
        there = [[a.to(weight.device) for a in parts[name]] for name, weight in zip(names, own, strict=True)]
        calls.append([[[getattr(a, factor) for a in layer] for layer in there] for factor in ("A", "B", "scale")])
    for (_, own, rest), factors in zip(groups if len(groups) > 1 else (), calls, strict=len(groups) > 1):
        ops.check_many(own, factors[0], factors[1], factors[2], rest)       # a call of the operator checks its own alone
    for (names, own, rest), factors in zip(groups, calls, strict=True):
        ops.merge_many_(own, *factors, residuals=rest, rounding=rounding, seed=_seeds(seed, names))
        residuals(model).update(zip(names, rest or [], strict=bool(rest)))
    return model


def add_dense(model: nn.Module, updates: Mapping[str, torch.Tensor], *, rounding: ops.Rounding = "nearest",
              residual: bool = False, seed: int | None = None) -> nn.Module:
    """W += ΔW for dense fp32 sums (out, in) by layer: how a streamed round is committed. Options and errors as merge."""
    own_weights, linears = weights(model, list(updates)), linear_modules(model)
    refuse_tied(model, {name: linears[name] for name in updates})
    for name, update in updates.items():
        if update.shape != own_weights[name].shape or not bool(torch.isfinite(update).all()):
            raise AdapterError(f"{name}: expected finite numbers for (out, in) = {tuple(own_weights[name].shape)}; got NaN, "
                               f"infinity or another shape, {tuple(update.shape)}. Nothing was written.")
    for names, own, rest in _groups(model, {name: linears[name] for name in updates}, residual):
        ops.add_many_(own, [updates[name].to(w.device) for name, w in zip(names, own, strict=True)], residuals=rest,
                      rounding=rounding, seed=_seeds(seed, names))
        residuals(model).update(zip(names, rest or [], strict=bool(rest)))
    return model


def _groups(model: nn.Module, bases: Mapping[str, nn.Module],
            residual: bool) -> Iterator[tuple[list[str], list[torch.Tensor], list[torch.Tensor] | None]]:
    """What one call of an operator can write: layers of one device, all with residuals (16-bit weights, if wanted) or none.

    Gives (names, weights, residuals or None). Raises TargetError for a weight that is no plain matrix."""
    found: dict[tuple[torch.device, bool], list[str]] = {}
    for name, base in bases.items():
        _refuse_opaque(name, base)
        weight = own_part(matrix(base))
        found.setdefault((weight.device, residual and weight.itemsize == 2), []).append(name)
    held = residuals(model)
    for (_, kept), names in found.items():
        own = [own_part(matrix(bases[name])) for name in names]
        yield names, own, [_residual(held.get(name), w) for name, w in zip(names, own, strict=True)] if kept else None


def _seeds(seed: int | None, names: Sequence[str]) -> list[int] | None:
    return None if seed is None else [derive(seed, name) for name in names]


def refuse_read_past(model: nn.Module, names: Iterable[str]) -> None:
    """Raises TargetError where a module cannot be put in the place of a layer, or its parent would not ask it."""
    for name in names:
        if not name:
            raise TargetError("the model is itself one linear module, which cannot be replaced inside itself. Wrap it in "
                              "nn.Sequential.")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise TargetError(f"{name}: nn.TransformerEncoderLayer reads this weight past an adapter in eval mode. Leave it out.")


def _refuse_opaque(name: str, base: nn.Module) -> None:
    if is_opaque(base) and not is_sharded(base.weight):
        raise TargetError(f"{name}: expected a weight in floating point to write to; got a {type(base).__name__}, whose own is not."
                          " Keep the update beside it (flora.nn.accumulate; in a config, merge_into: adapter), or load the model "
                          "in floating point.")
    refuse_parametrized(base, name)
    if base.weight.device != device_for(base):
        raise TargetError(f"{name}: expected a weight that lies in memory; accelerate has offloaded this one, and what is written "
                          "to it would be lost. Keep the update beside it (flora.nn.accumulate), or merge before it is dispatched.")
    if overrides(base):
        raise TargetError(f"{name}: expected a module that gives x Wᵀ + bias; got a {type(base).__name__} with a forward of its "
                          "own: an update merged into its weight need not do what the adapter did. Keep the update beside it "
                          "(flora.nn.accumulate; in a config, merge_into: adapter), or leave it out of targets.")


def _refuse_not_finite(name: str, adapters: Sequence[Adapter]) -> None:
    if not all(bool(torch.isfinite(t).all()) for a in adapters for t in (a.A, a.B, a.scale)):
        raise AdapterError(f"{name}: expected finite numbers; got NaN or infinity; nothing was merged. Leave the adapter out.")


def _residual(held: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """The residual of a weight, of zeros where it has none yet; it follows the weight to its device."""
    if held is None:
        return torch.zeros(weight.shape, dtype=torch.bfloat16, device=weight.device)
    return held.to(weight.device)


def residuals(model: nn.Module) -> dict[str, torch.Tensor]:
    """What rounding left of merged weights, by layer name: bf16 (out, in); the base is weight + residual. Empty where no merge
    kept one. The dict is the model's own: a checkpoint saves it and puts it back."""
    kept: dict[str, torch.Tensor] = model.__dict__.setdefault("_flora_residuals", {})
    return kept


def accumulate(model: nn.Module, adapters: Adapters, rank: int | None = None, tol: float = 0.0) -> dict[str, float]:
    """Adds an update beside the base instead of into it: for weights in 4 or 8 bits, or shared with others.

    The layer becomes an Accumulated, which holds the sum of all updates so far as one adapter and gives it to every forward
    pass. Where that sum outgrows `rank`, or min(out, in), or tol > 0, it is compressed. Returns, by layer, the relative error
    ‖ΔW - kept‖ / ‖ΔW‖ of this compression (0 where there was none). Checks all before it changes a layer.
    Raises TargetError for a layer that does not exist or fit, or while adapters are attached; AdapterError for NaN or infinity.
    """
    if lora_layers(model):
        raise TargetError("expected a model without attached adapters; call flora.detach(model) first.")
    bases, errors = bases_of(model, adapters, tied=True), {}
    refuse_read_past(model, bases)
    kept = {}
    for name, base in bases.items():
        _refuse_not_finite(name, [adapters[name]])
        sums = [base.adapter, adapters[name].to(base.A.device)] if isinstance(base, Accumulated) else [adapters[name]]
        whole = stack(sums)
        bound = min(*whole.shape, rank or whole.rank)
        kept[name] = compress(whole, bound, tol) if whole.rank > bound or tol > 0 else whole
        size = norm(whole) if kept[name] is not whole else 0.0
        errors[name] = norm(stack([whole, kept[name] * -1])) / size if size else 0.0
    for name, base in bases.items():
        inner = base.base if isinstance(base, Accumulated) else base
        replace(model, base, Accumulated(inner, kept[name].to(device_for(inner))))
    return errors


def accumulated(model: nn.Module) -> dict[str, Adapter]:
    """The updates kept beside the base so far, by layer name; empty where there are none."""
    return {name: m.adapter for name, m in linear_modules(model).items() if isinstance(m, Accumulated)}


def weights(model: nn.Module, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """The base weights (out, in) of these layers: views, for a dense broadcast. Raises TargetError as merge does."""
    put_away(model)
    linears, out = linear_modules(model), {}
    for name in layers:
        if name not in linears:
            raise TargetError(f"expected a linear module named {name!r} in the model; got none.")
        _refuse_opaque(name, linears[name])
        if is_sharded(linears[name].weight):
            raise TargetError(f"{name}: expected a weight that this process holds whole; got a sharded one, which adapters can be "
                              "merged into and nothing else. Read or write it before the model is sharded.")
        out[name] = matrix(linears[name]).detach()
    return out


def load_weights(model: nn.Module, dense: Mapping[str, torch.Tensor]) -> nn.Module:
    """Writes base weights (out, in) over those of the model; their residuals are gone with them. Checks all before it writes one.

    Raises TargetError for a layer that does not exist, does not fit, is quantised or tied; AdapterError for NaN or infinity.
    """
    own = weights(model, list(dense))
    refuse_tied(model, {name: module for name, module in linear_modules(model).items() if name in dense})
    for name, weight in dense.items():
        if weight.shape != own[name].shape:
            raise TargetError(f"{name}: expected a weight (out, in) = {tuple(own[name].shape)}; got {tuple(weight.shape)}, of "
                              "another model")
        if not bool(torch.isfinite(weight.to(own[name].dtype)).all()):
            raise AdapterError(f"{name}: expected finite numbers in {own[name].dtype}; got NaN or infinity; nothing was written.")
    check_memory_writable(list(own.values()), list(own))
    with torch.no_grad():
        for name, weight in dense.items():
            own[name].copy_(weight)
            residuals(model).pop(name, None)
    return model

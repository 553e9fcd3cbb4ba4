"""Weights of which each of several processes holds a part (DTensor, as FSDP2's fully_shard makes them).

Inside a module that FSDP has wrapped, a forward or backward pass sees the whole weight, so adapters need nothing of their own.
Outside, a process holds some rows or columns: those of ΔW = B diag(scale) A are made of the same rows of B, or columns of A, alone.
So each process merges into its own part, and nothing is sent.
"""
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flora.adapter import Adapter
from flora.errors import AdapterError, TargetError


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; of its own look, so that torch.distributed need not be imported to ask."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def _fsdp(model: nn.Module) -> list[nn.Module]:
    """The modules that fully_shard has wrapped."""
    return [module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard")]


def holds_shards(model: nn.Module) -> bool:
    """Whether any parameter of a model is spread over processes, be it gathered at the moment."""
    return bool(_fsdp(model)) or any(is_sharded(parameter) for parameter in model.parameters())


def put_away(model: nn.Module) -> bool:
    """Frees the whole weights that FSDP keeps between passes (the outermost module's), as what is written to those is lost. Returns
    whether the model holds shards."""
    for module in _fsdp(model):
        module.reshard()
    return holds_shards(model)


def whole(tensor: Tensor) -> Tensor:
    """All of it: of a sharded one every process asks at once."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_span(name: str, tensor: Tensor) -> tuple[slice, ...]:
    """Which part of a sharded tensor this process holds, by dimension. Raises TargetError for a layout that is not known."""
    spans = [slice(0, size) for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", 0) % len(spans)
        if type(placement).__name__ != "Shard" or spans[dim] != slice(0, tensor.shape[dim]):
            raise TargetError(f"{name}: expected a weight cut once along rows or columns (Shard), or whole (Replicate); got "
                              f"{tensor.placements}. Merge into the whole weight before it is sharded.")
        each = -(-tensor.shape[dim] // tensor.device_mesh.size(axis))
        first = each * tensor.device_mesh.get_local_rank(axis)
        spans[dim] = slice(min(first, tensor.shape[dim]), min(first + each, tensor.shape[dim]))
    return tuple(spans)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it; writing there writes to the weight."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def own_adapters(weight_of: Callable[[str], Tensor], parts: Mapping[str, Sequence[Adapter]],
                 rounding: str) -> dict[str, list[Adapter]]:
    """What this process merges: for every layer the adapters of its own part; layers of which it holds nothing are left out.

    All numbers are looked at in every process, so that none writes where another refuses. Raises AdapterError, TargetError.
    """
    if rounding != "nearest":
        raise TargetError(f"rounding: expected nearest for weights that are sharded; got {rounding}, whose draws are those of "
                          "whole weights. Keep a residual (residual=True), or merge before the model is sharded.")
    out = {}
    for name, adapters in parts.items():
        weight = weight_of(name)
        if not is_sharded(weight):
            out[name] = list(adapters)
            continue
        rows, columns = own_span(name, weight)
        if not all(bool(torch.isfinite(t).all()) for a in adapters for t in (a.A, a.B, a.scale)):
            raise AdapterError(f"{name}: expected finite numbers; got NaN or infinity; nothing was merged. Leave the adapter out.")
        if rows.stop > rows.start and columns.stop > columns.start:
            out[name] = [Adapter(a.A[:, columns], a.B[rows], a.scale) for a in adapters]
    return out

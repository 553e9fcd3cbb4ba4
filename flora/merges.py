"""In-place operators on weights and stacks: W += Σ B_k diag(s_k) A_k over all layers and clients at once; rank concatenation.

All or nothing: shapes, dtypes, devices, memory and numbers of every operand are checked before the first weight is written.
"""
from collections.abc import Sequence
from operator import index
from typing import Literal

import torch
from torch import Tensor

from flora import kernels
from flora.checks import FLOATS, check, check_dtype, check_ranks, check_weight, check_writable
from flora.kernels import reference
from flora.library import LIB, implement, writes_only
from flora.memory import apart_from, check_apart, check_memory_writable
from flora.seeds import derive

LIB.define("merge_(Tensor(a!)[] weights, Tensor(b!)[] residuals, Tensor[] As, Tensor[] Bs, Tensor[] scales, int[] counts, "
           "int[] seeds) -> ()")
LIB.define("stack_(Tensor(a!) out_A, Tensor(b!) out_B, Tensor(c!) out_scale, Tensor[] As, Tensor[] Bs, Tensor[] scales) -> ()")

Rounding = Literal["nearest", "stochastic"]
_FLOATS = set(FLOATS)


def _check_memory(weights: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Checks that what is written can be, and lies apart; gives where it lies."""
    names = [f"weight {layer}" for layer in range(len(weights))] + [f"residual {layer}" for layer in range(len(residuals))]
    spans = check_apart([*weights, *residuals], names)
    check_memory_writable([*weights, *residuals], names)
    return spans


def _merge(weights: Sequence[Tensor], residuals: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor],
           scales: Sequence[Tensor], counts: Sequence[int], seeds: Sequence[int]) -> None:
    """merge_ after the checks of memory and factors. Factors that lie in a weight are copied."""
    spans = _check_memory(weights, residuals)
    if _checked(range(len(weights)), weights, residuals, As, Bs, scales, counts, seeds, True):
        kernels.resolve("merge_", weights[0].device, weights[0].dtype)(
            weights, residuals, *(apart_from(group, spans) for group in (As, Bs, scales)), counts, seeds)


def _checked(layers: Sequence[int], weights: Sequence[Tensor], residuals: Sequence[Tensor], As: Sequence[Tensor],
             Bs: Sequence[Tensor], scales: Sequence[Tensor], counts: Sequence[int], seeds: Sequence[int], write: bool) -> bool:
    """kernels.reference.checked_merge_ for weights on one device; whether the merge waits for copies. layers: what the weights are
    called. Raises AdapterError for a factor that does not fit or is not finite."""
    kernel = kernels.resolve("checked_merge_", weights[0].device, weights[0].dtype)
    what, number = kernel(weights, residuals, As, Bs, scales, counts, seeds, write)
    if what in (1, 2):
        which, client = divmod(number, len(As)) if what == 2 else (-1, number)
        _refuse(layers, weights, (As[client], Bs[client], scales[client]), counts, client, which)
    return bool(what == 3)


def _refuse(layers: Sequence[int], weights: Sequence[Tensor], ranks: tuple[Tensor, Tensor, Tensor], counts: Sequence[int],
            client: int, which: int) -> None:
    """Raises AdapterError for a client's ranks, which do not fit or of which one (0: A, 1: B, 2: scale) is not finite."""
    at = next(i for i in range(len(counts)) if sum(counts[:i + 1]) > client)
    name, (out, inn) = f"layer {layers[at]}, adapter {client - sum(counts[:at])}", weights[at].shape
    check_ranks(name, ranks, (out, inn), weights[at].device)
    check(f"{name}, {('A', 'B', 'scale')[which]}", False, "finite numbers",
          "NaN or infinity; nothing was merged. Leave the adapter out")


def _fits(weights: Sequence[Tensor], residuals: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor],
          scales: Sequence[Tensor], counts: Sequence[int], seeds: Sequence[int]) -> None:
    """merge_ on tensors without numbers."""
    misfit = reference.first_misfit(weights, As, Bs, scales, counts)
    if misfit >= 0:
        _refuse(range(len(weights)), weights, (As[misfit], Bs[misfit], scales[misfit]), counts, misfit, -1)


implement("merge_", 2, _merge)
implement("stack_", 3)
writes_only("merge_", _fits)
writes_only("stack_")


def _seeds(rounding: Rounding, seed: int | Sequence[int] | None, layers: int) -> list[int]:
    """One seed a layer where rounding is stochastic, none where it is not."""
    check("rounding", rounding in ("nearest", "stochastic"), '"nearest" or "stochastic"', repr(rounding))
    if rounding == "nearest":
        return []
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    if hasattr(seed, "__index__"):
        seed = index(seed)
        return [derive(seed, "merge", layer) for layer in range(layers)]
    check("seed", len(seed) == layers and all(isinstance(s, int) and 0 <= s < 1 << 63 for s in seed),
          f"an int, or {layers} ints from 0 to 2⁶³ - 1, one a layer", seed)
    return list(seed)


def _check_written(weights: Sequence[Tensor], residuals: Sequence[Tensor] | None) -> None:
    """Dtypes, shapes and devices of weights and residuals."""
    check("residuals", residuals is None or len(residuals) == len(weights), f"{len(weights)} tensors, one a layer",
          residuals and len(residuals))
    for layer, weight in enumerate(weights):
        check_weight(weight)
        check_writable("weight", weight)
        check(f"weight {layer}", weight.device == weights[0].device, f"a tensor on {weights[0].device}, where the first is",
              weight.device)
    for weight, residual in zip(weights, residuals or (), strict=bool(residuals)):
        check_dtype("residual", residual)
        check("residual", residual.shape == weight.shape and residual.device == weight.device,
              f"{tuple(weight.shape)} on {weight.device}, as its weight", f"{tuple(residual.shape)} on {residual.device}")
        check_writable("residual", residual)


def _flat(weights: Sequence[Tensor], As: Sequence[Sequence[Tensor]], Bs: Sequence[Sequence[Tensor]],
          scales: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """As, Bs and scales of all layers one after another, the scales in fp32, and how many each layer has."""
    L = len(weights)
    check("weights, As, Bs, scales", L == len(As) == len(Bs) == len(scales), "lists of one length, one entry a layer",
          (L, len(As), len(Bs), len(scales)))
    for layer, own in enumerate(zip(As, Bs, scales, strict=True)):
        if not len(own[0]) == len(own[1]) == len(own[2]):
            check(f"layer {layer}", False, "as many As as Bs and scales", tuple(len(one) for one in own))
    flat_A, flat_B, flat_scale = ([t.detach() if t.requires_grad else t for layer in group for t in layer]
                                  for group in (As, Bs, scales))
    flat_scale = [t if t.dtype == torch.float32 or t.dtype not in _FLOATS else t.float() for t in flat_scale]
    return flat_A, flat_B, flat_scale, [len(layer) for layer in As]


def check_many(weights: Sequence[Tensor], As: Sequence[Sequence[Tensor]], Bs: Sequence[Sequence[Tensor]],
               scales: Sequence[Sequence[Tensor]], residuals: Sequence[Tensor] | None = None) -> None:
    """Raises what merge_many_ would raise, and writes nothing: for merges that take several calls, on several devices."""
    _check_written(weights, residuals)
    _flat(weights, As, Bs, scales)
    _check_memory(weights, residuals or ())
    for device in dict.fromkeys(weight.device for weight in weights):
        own = [layer for layer, weight in enumerate(weights) if weight.device == device]
        here, some = [weights[i] for i in own], ([group[i] for i in own] for group in (As, Bs, scales))
        _checked(own, here, [], *_flat(here, *some), [], False)


def merge_many_(weights: Sequence[Tensor], As: Sequence[Sequence[Tensor]], Bs: Sequence[Sequence[Tensor]],
                scales: Sequence[Sequence[Tensor]], *, residuals: Sequence[Tensor] | None = None, rounding: Rounding = "nearest",
                seed: int | Sequence[int] | None = None) -> Sequence[Tensor]:
    """W_l += Σ_k B_lk diag(s_lk) A_lk in place for every layer l, from the clients' own buffers; no dense ΔW, no copy of a stack.

    weights: (out, in) each, any strides, floating point, with memory of its own (a tied weight once); As, Bs, scales: lists over
    layers, each a list over clients of any ranks, `As[layer][client]` being (r, in), of Bs (out, r), of scales (r,). Products are
    summed in fp32 (fp64 for fp64 weights) over all ranks; the weight is read once, written once and rounded once.
    residuals: one tensor a layer of the weight's shape, such as bf16 beside bf16, that holds what rounding left (start with
    zeros): W + residual is exact to the residual's precision however many merges follow. rounding: "nearest" (to even), or
    "stochastic": up or down in proportion, so that the mean of many is exact; for 16-bit weights (with residuals: for them);
    fp32 and fp64 round to nearest. seed: an int, or one a layer; the same seed gives the same bits. Returns weights.
    Writes under no_grad and bumps the version counters. Raises AdapterError, before anything is written, for shapes, dtypes,
    devices or memory that do not fit, and for NaN or infinity in an adapter. FLoRA, arXiv 2409.05976, section 3.
    """
    _check_written(weights, residuals)
    held, seeds, factors = list(residuals or []), _seeds(rounding, seed, len(weights)), _flat(weights, As, Bs, scales)
    if weights:
        torch.ops.flora.merge_([w.detach() for w in weights], [r.detach() for r in held], *factors, seeds)
    return weights


def add_many_(weights: Sequence[Tensor], updates: Sequence[Tensor], *, residuals: Sequence[Tensor] | None = None,
              rounding: Rounding = "nearest", seed: int | Sequence[int] | None = None) -> Sequence[Tensor]:
    """W_l += ΔW_l for dense fp32 sums (out, in), a block of rows at a time, rounded as merge_many_ does: how a streamed round ends.

    Raises AdapterError, before anything is written, for what does not fit and for NaN or infinity in an update.
    """
    check("updates", len(updates) == len(weights), f"{len(weights)} tensors, one a layer", len(updates))
    seeds = _seeds(rounding, seed, len(weights))
    _check_written(weights, residuals)
    for layer, (weight, update) in enumerate(zip(weights, updates, strict=True)):
        check(f"update {layer}", update.shape == weight.shape and update.dtype in (torch.float32, torch.float64),
              f"{tuple(weight.shape)} in float32", f"{tuple(update.shape)} in {update.dtype}")
        check(f"update {layer}", update.device == weight.device, f"a tensor on {weight.device}", update.device)
        check(f"update {layer}", bool(torch.isfinite(update).all()), "finite numbers", "NaN or infinity; nothing was written")
    updates = apart_from(updates, _check_memory(weights, residuals or ()))
    with torch.no_grad():
        for i, (weight, update) in enumerate(zip(weights, updates, strict=True)):
            for first in range(0, weight.shape[0], 256):
                rows = slice(first, first + 256)
                reference.add_rounded_(weight[rows], residuals[i][rows] if residuals else None, update[rows],
                                       seeds[i] if seeds else None, first)
    return weights


def merge_(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, *, residual: Tensor | None = None, rounding: Rounding = "nearest",
           seed: int | None = None) -> Tensor:
    """W += B diag(scale) A in place, summed in fp32 over all ranks and rounded once; no dense ΔW.

    weight (out, in), any strides (a transposed view for Conv1D); A (R, in), B (out, R), scale (R,). Returns weight. residual,
    rounding, seed, what is raised and when: as merge_many_, of which this is the case of one layer and one adapter.
    """
    merge_many_([weight], [[A]], [[B]], [[scale]], residuals=None if residual is None else [residual], rounding=rounding, seed=seed)
    return weight


def stack_(out_A: Tensor, out_B: Tensor, out_scale: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor],
           scales: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenates ranks into preallocated buffers: out_A (R, in), out_B (out, R), out_scale (R,), R = Σ r_k.

    As[k] (r_k, in), Bs[k] (out, r_k), scales[k] (r_k,), any float dtypes; a copy where the dtypes agree. Returns the buffers.
    Raises AdapterError where the ranks do not add up to R or a shape differs.
    """
    check("As, Bs, scales", len(As) == len(Bs) == len(scales), "lists of one length", (len(As), len(Bs), len(scales)))
    check("out_A and out_B", out_A.dim() == out_B.dim() == 2, "two matrices", (tuple(out_A.shape), tuple(out_B.shape)))
    outs, shape = (out_A, out_B, out_scale), (out_B.shape[0], out_A.shape[1])
    check_ranks("out", outs, shape, out_A.device)
    for k, ranks in enumerate(zip(As, Bs, scales, strict=True)):
        check_ranks(f"adapter {k}", ranks, shape, out_A.device)
    total = sum(A.shape[0] for A in As)
    check("out_A", total == out_A.shape[0], f"{total} ranks, the sum of the adapters' ranks", out_A.shape[0])
    check("out_scale", out_scale.dtype == torch.float32, "float32", out_scale.dtype)
    for name, tensor in zip(("out_A", "out_B", "out_scale"), outs, strict=True):
        check_writable(name, tensor)
    torch.ops.flora.stack_(*(t.detach() for t in outs), *([t.detach() for t in each] for each in (As, Bs, scales)))
    return outs

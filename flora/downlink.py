"""How an update that every client merges travels down: as the stack, at full rank, cut, or as new weights, whatever is cheapest.

A stack of rank R costs R (in + out) numbers, at most min(in, out) of its ranks are needed, and beyond R = in out / (in + out) the
weight itself is smaller. All parties, the server's own model too, apply what was sent, so their bases stay the same.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from flora import ops
from flora.adapter import Adapter, compress, norm, stack
from flora.errors import ConfigError
from flora.messages import Broadcast
from flora.parallel import each

ROUNDING = 5e-7                                                 # relative to ΔW: what factors in fp32 lose anyway


@dataclass(frozen=True)
class Downlink:
    """how: "stack" as it is; "compressed" at full rank, exact up to rounding; "threshold" cut to a relative error of tol in the
    Frobenius norm, layer by layer; "dense" as new weights; "auto" the fewest bytes of these for each layer, within tol.
    Raises ConfigError."""
    how: Literal["stack", "compressed", "threshold", "dense", "auto"] = "stack"
    tol: float = 0.0

    def __post_init__(self) -> None:
        if self.how not in ("stack", "compressed", "threshold", "dense", "auto") or not 0.0 <= self.tol < 1.0:
            raise ConfigError('expected a downlink out of stack, compressed, threshold, dense, auto, and tol in [0, 1); got '
                              f"{self.how!r}, {self.tol}")


def lighter(broadcast: Broadcast, downlink: Downlink, weights: Mapping[str, torch.Tensor] | None = None) -> tuple[Broadcast, float]:
    """The broadcast with its `merge` in the form that downlink says, and the relative error of that, over all layers together.

    weights: of the base that it merges into (out, in), by layer, left as they are; without them nothing is sent dense.
    Raises ConfigError where dense is asked for without them.
    """
    if broadcast.merge is None or downlink.how == "stack":
        return broadcast, 0.0
    if downlink.how == "dense" and weights is None:
        raise ConfigError("downlink dense: expected the weights of the base, which it sends; got none. Use another downlink with "
                          "merge_into: adapter, or with a server that holds no model.")
    weights = weights or {}
    merge, base, lost, whole = {}, {}, 0.0, 0.0
    forms = each(lambda name: _form(broadcast.merge[name], weights.get(name), downlink), broadcast.merge)
    for (name, a), (adapter, error, size) in zip(broadcast.merge.items(), forms, strict=True):
        if adapter is None:
            base[name] = _merged(weights[name], a)
        else:
            merge[name] = adapter
        lost, whole = lost + error**2, whole + size**2
    out = replace(broadcast, merge=merge or None, base={**(broadcast.base or {}), **base} or None)
    return out, math.sqrt(lost / whole) if whole else 0.0


def _form(a: Adapter, weight: torch.Tensor | None, downlink: Downlink) -> tuple[Adapter | None, float, float]:
    """What is sent for a layer (None: its weight), the norm of what that loses, and the norm of ΔW."""
    dense = math.inf if weight is None else weight.numel() * weight.element_size()
    if downlink.how == "dense":
        return None, 0.0, norm(a)
    best = compress(a, tol=max(downlink.tol, ROUNDING) if downlink.how != "compressed" else ROUNDING)
    if downlink.how == "auto" and min(a.nbytes, dense) <= best.nbytes:
        return (a if a.nbytes <= dense else None), 0.0, norm(a)
    return best, norm(stack([a, best * -1.0])), norm(a)


def _merged(weight: torch.Tensor, a: Adapter) -> torch.Tensor:
    out = weight.detach().clone()
    ops.merge_(out, a.A.to(out.device), a.B.to(out.device), a.scale.to(out.device))
    return out

"""AdaLoRA's two decisions: how much a triplet matters, and how many triplets a client keeps at a step.

A rank is a triplet (P_i, λ_i, Q_i). Its importance is sensitivity × uncertainty, both smoothed over steps, since the gradient of
one batch is noise; the triplets of all layers compete for one budget, which falls from all ranks to the target.

Reference: AdaLoRA, arXiv 2303.10512, sections 3.2 and 3.3.
"""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SMOOTHING = 0.85                                                # β1 = β2, of sensitivity and of uncertainty
ORTHOGONALITY = 0.1                                             # γ, the regulariser's weight


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """4 (M Mᵀ - I) M, the gradient of ‖M Mᵀ - I‖²_F. rows: M (r, n), of Q, or of P with its ranks outermost. Equation 4."""
    gram = rows @ rows.T
    gram.diagonal().sub_(1)
    return 4 * gram @ rows


class Importance:
    """s(w) = Ī(w) · Ū(w), with I = |w ∇w|, Ī and Ū the moving averages of I and of |I - Ī|, from zero. Equations 8 to 10."""

    def __init__(self) -> None:
        self._smooth: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in a step's gradients, with the numbers that they were taken at; a tensor without one stays as it was."""
        for name, w in parameters.items():
            if w.grad is None:
                continue
            now = (w.detach() * w.grad).abs_()
            mean, doubt = self._smooth.setdefault(name, (torch.zeros_like(now), torch.zeros_like(now)))
            mean.lerp_(now, 1 - SMOOTHING)
            doubt.lerp_(now.sub_(mean).abs_(), 1 - SMOOTHING)

    def of(self, layer: str, scores: Tensor) -> Tensor:
        """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) of a layer's triplets, (r,). Equation 7.

        scores: (r,), any numbers; what is given back for a layer that has had no gradient is zeros of their kind.
        """
        total = torch.zeros_like(scores)
        for part in ("lambda", "P", "Q"):
            if (smooth := self._smooth.get(f"{layer}/{part}")) is not None:
                each = smooth[0] * smooth[1]
                total += each if each.dim() == 1 else each.mean(1)
        return total


class Schedule:
    """b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))³ between a warm-up at b_0 and a rest at b_T. Equation 12.

    steps: T, of the round; full: b_0; target: b_T. The warm-up has ⌊T / 10⌋ steps, the rest ⌊T / 2⌋, and at least one step lies
    between, so that a round of any length ends at the target.
    """

    def __init__(self, steps: int, full: int, target: int):
        self.full, self.target = full, target
        self.warm, self.last = steps // 10, steps - steps // 2          # the budget falls at the steps from warm to last - 1

    def settled(self, step: int) -> bool:
        """Whether the triplets that are kept no longer change at this step, counted from 0."""
        return step >= self.last

    def budget(self, step: int) -> int:
        """How many triplets are left after this step, counted from 0."""
        done = (step + 1 - self.warm) / (self.last - self.warm)
        left = (1 - min(1.0, max(0.0, done))) ** 3
        return self.target + round((self.full - self.target) * left)


def target_budget(ranks: Sequence[int], keep: float) -> int:
    """How many of a client's triplets are kept in the end: this share of all, of each layer at least one."""
    return max(len(ranks), round(keep * sum(ranks)))


def best(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Which triplets are kept: the best of every layer, and the best of all others up to `count`. Masks (r,) by layer.

    Decided on the device; of equal scores the first one counts.
    """
    ranked = torch.cat([s.clone().index_fill_(0, s.argmax(), torch.inf) for s in scores.values()])
    mask = torch.zeros_like(ranked, dtype=torch.bool)
    mask[ranked.argsort(descending=True, stable=True)[:count]] = True
    return dict(zip(scores, mask.split([len(s) for s in scores.values()]), strict=True))

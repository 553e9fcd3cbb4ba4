"""What a client trains of its ranks: the factors themselves, a core before a fixed factor (Fed-SB), or triplets (AdaLoRA).

The model knows A, B and scale alone. A form has the tensors that the optimiser works on, takes their gradients from those of A
and B, writes A and B after a step, and reads the adapters in the end. So every form trains in one batch with the others, through
the same operators; the plain one works on the buffers themselves and copies nothing.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.adaptive import ORTHOGONALITY, Importance, Schedule, best, orthogonality_gradient, target_budget
from flora.errors import ConfigError
from flora.frames import core
from flora.layer import LoRALinear
from flora.seeds import derive


@dataclass(frozen=True)
class Slot:
    """A client's ranks first:last in the buffers of one layer, as views: A (r, in), B (r, out) with its ranks outermost, scale."""
    layer: LoRALinear
    first: int
    last: int

    @property
    def A(self) -> Tensor:
        return self.layer.A.detach()[self.first:self.last]

    @property
    def B(self) -> Tensor:
        return self.layer.B.detach().T[self.first:self.last]

    @property
    def scale(self) -> Tensor:
        return self.layer.scale[self.first:self.last]

    def gradient(self, factor: str) -> Tensor | None:
        """The client's part of the gradient of "A" or "B", laid out as the factor is; None where there is none."""
        whole = getattr(self.layer, factor).grad
        return None if whole is None else (whole.T if factor == "B" else whole)[self.first:self.last]

    def adapter(self) -> Adapter:
        """A copy on the CPU."""
        return copied(self.A, self.B, self.scale)


def copied(A: Tensor, B: Tensor, scale: Tensor) -> Adapter:
    """An adapter on the CPU that shares no memory with these. B (r, out)."""
    return Adapter(A.to("cpu", copy=True), B.T.to("cpu", memory_format=torch.contiguous_format, copy=True),
                   scale.to("cpu", copy=True))


class Form(Protocol):
    """A client's trained numbers. parameters: what the optimiser works on, by "<layer>/<name>"."""
    parameters: dict[str, Tensor]

    def take_gradients(self) -> None:
        """Gives the parameters their gradients, from those of A and B."""

    def write(self) -> None:
        """Writes A and B from the parameters, after a step of the optimiser."""

    def adapters(self) -> dict[str, Adapter]:
        """The client's adapters as they are now: copies on the CPU."""


class Factors:
    """A and B themselves, those of them that train: views of the buffers, so there is nothing to write."""

    def __init__(self, slots: Mapping[str, Slot]):
        self.slots = slots
        places = [(name, f) for name, slot in slots.items() for f in "AB" if getattr(slot.layer, f).requires_grad]
        self.parameters = {f"{name}/{f}": getattr(slots[name], f) for name, f in places}
        # the buffers themselves: asking a module for its parameter takes as long as cutting a gradient, and there are thousands
        self._places = [(getattr(slots[name].layer, f), f == "B", slice(slots[name].first, slots[name].last)) for name, f in places]

    def take_gradients(self) -> None:
        for own, (buffer, turned, ranks) in zip(self.parameters.values(), self._places, strict=True):
            whole = buffer.grad
            own.grad = None if whole is None else (whole.T if turned else whole)[ranks]

    def write(self) -> None:
        pass

    def adapters(self) -> dict[str, Adapter]:
        return {name: slot.adapter() for name, slot in self.slots.items()}


class Pruning(Factors):
    """A and B, with the gradient of penalty · Σ ‖B[:, keep:]‖_F ‖A[keep:]‖_F added: the ranks from `keep` on are pushed out.

    A rank that is all zeros gets none of it. HetLoRA, arXiv 2401.06432, section 3.2.
    """

    def __init__(self, slots: Mapping[str, Slot], keep: int, penalty: float):
        super().__init__(slots)
        self.keep, self.penalty = keep, penalty

    def take_gradients(self) -> None:
        super().take_gradients()
        for name in self.slots if self.penalty else ():
            A, B = (self.parameters[f"{name}/{f}"] for f in "AB")
            sizes = [torch.linalg.norm(f[self.keep:]) for f in (A, B)]
            for own, size, other in ((A, *sizes), (B, *sizes[::-1])):
                if own.grad is not None:
                    own.grad[self.keep:] += (self.penalty * other / size).nan_to_num(0.0, 0.0, 0.0) * own[self.keep:]


class Core:
    """R of A = R · frame, (r, r) a layer; dR = dA · frameᵀ. B and the frame are fixed. Fed-SB, arXiv 2502.15436, section 3.

    frame_of(shape, rank, layer): the frame, (r, in). Raises ConfigError for a start that is no core times this frame.
    """

    def __init__(self, slots: Mapping[str, Slot], frame_of: Callable[[tuple[int, int], int, str], Tensor]):
        self.slots, self._frames, self.parameters = slots, {}, {}
        for name, slot in slots.items():
            a = Adapter(slot.A, slot.B.T, slot.scale)
            frame = self._frames[name] = frame_of(a.shape, a.rank, name).to(a.A)
            R = self.parameters[f"{name}/core"] = core(a, frame)
            if float((R @ frame - a.A).norm()) > 0.01 * float(a.A.norm()):
                raise ConfigError(f"{name}: expected a start whose A is a core times the frame of Broadcast.frame; got another. "
                                  "Give the seed that the run began with, and the same to aggregate (seed=...).")

    def take_gradients(self) -> None:
        for R, (name, slot) in zip(self.parameters.values(), self.slots.items(), strict=True):
            dA = slot.gradient("A")
            R.grad = None if dA is None else dA @ self._frames[name].T

    def write(self) -> None:
        for R, (name, slot) in zip(self.parameters.values(), self.slots.items(), strict=True):
            torch.mm(R, self._frames[name], out=slot.A)

    def adapters(self) -> dict[str, Adapter]:
        return {name: slot.adapter() for name, slot in self.slots.items()}


class Triplets:
    """ΔW = P diag(s Λ) Q with A = Λ ∘ Q, P = B and s = alpha / r: ranks of all layers compete, those that lose have Λ = 0.

    dQ = Λ ∘ dA, dΛ_i = dA_i · Q_i, dP = dB, and the gradient of γ (‖PᵀP - I‖²_F + ‖QQᵀ - I‖²_F), γ = 0.1, which keeps P and Q
    near orthogonal, so that Λ says what a rank is worth. The start's ΔW is kept: Q and P are its factors normalised, Λ the norms;
    a rank with a side of zeros has a random unit vector there (by key) and Λ = 0. The adapters hold the ranks that are kept, and
    Λ s as their scale. keep: the share of ranks kept after num_steps steps. AdaLoRA, arXiv 2303.10512, section 3.
    """

    def __init__(self, slots: Mapping[str, Slot], scale: float, keep: float, num_steps: int, key: tuple[int | str, ...]):
        self.slots, self.scale, self.parameters = slots, scale, {}
        self._importance, self._step = Importance(), 0
        ranks = [slot.last - slot.first for slot in slots.values()]
        self._schedule = Schedule(num_steps, sum(ranks), target_budget(ranks, keep))
        for name, slot in slots.items():
            Q, size_Q = _unit(slot.A, derive(*key, name, "Q"))
            P, size_P = _unit(slot.B, derive(*key, name, "P"))
            value = size_Q * size_P * slot.scale.double() / scale
            slot.B.copy_(P)
            slot.scale.fill_(scale)
            self.parameters |= {f"{name}/Q": Q.to(slot.A.dtype), f"{name}/P": slot.B,
                                f"{name}/lambda": value.to(torch.promote_types(slot.A.dtype, torch.float32))}
        self._kept = {name: torch.ones_like(self._of(name)[2], dtype=torch.bool) for name in slots}
        self._fill()

    def _of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Q (r, in), P (r, out), Λ (r,) of a layer."""
        return tuple(self.parameters[f"{name}/{part}"] for part in ("Q", "P", "lambda"))

    def _fill(self) -> None:
        for name, slot in self.slots.items():
            Q, _, value = self._of(name)
            slot.A.copy_(value[:, None] * Q)

    def take_gradients(self) -> None:
        for name, slot in self.slots.items():
            Q, P, value = self._of(name)
            dA, dB = slot.gradient("A"), slot.gradient("B")
            if dA is None or dB is None:
                Q.grad = P.grad = value.grad = None
                continue
            Q.grad = (value[:, None] * dA).to(Q.dtype) + ORTHOGONALITY * orthogonality_gradient(Q)
            P.grad = dB + ORTHOGONALITY * orthogonality_gradient(P)
            value.grad = (dA.to(value.dtype) * Q).sum(1)
        self._importance.observe(self.parameters)

    def write(self) -> None:
        """After a step: which triplets are left, by importance, until the budget rests; then those."""
        if not self._schedule.settled(self._step):
            scores = {name: self._importance.of(name, self._of(name)[2]) for name in self.slots}
            self._kept = best(scores, self._schedule.budget(self._step))
        self._step += 1
        for name, kept in self._kept.items():
            self._of(name)[2].mul_(kept)
        self._fill()

    def adapters(self) -> dict[str, Adapter]:
        out = {}
        for name, kept in self._kept.items():
            Q, P, value = self._of(name)
            out[name] = copied(Q[kept], P[kept], value[kept] * self.scale)
        return out


def _unit(rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of norm one and their norms (r,), fp64; a row of zeros becomes a random one, by seed."""
    exact = rows.double()
    size = exact.norm(dim=1)
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(rows.device)
    there = torch.where((size > 0)[:, None], exact, drawn)
    return there / there.norm(dim=1, keepdim=True), size

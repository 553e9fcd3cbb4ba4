"""Differential privacy of single examples: what leaves a client's step is noisy, so nobody has to be trusted with it.

    g = (Σ_i clip_C(∇ℓ_i) + N(0, (z C)²)) / b         ℓ_i: the mean over example i's own terms; clipped over all layers jointly

b is the batch size of the settings, accumulation included, however many rows a step has. An example's gradient is a client's whole
gradient in a pass in which that client has one row; so passes hold the first rows of all clients, then the second ones, ..., and
nothing but the order of rows is new. An example without labels, or whose gradient is not finite, counts as zero; a step in which no
example has labels is taken all the same, on noise. AdamW and what else works on g alone comes after.

Neighbours: the same rows, of which one counts as zero. An example is in one step of an epoch, in an order that the seed and the
number of rows decide, so ε is that of the Gaussian mechanism used once an epoch; no sampling is claimed to help.
Reference: DP-SGD, arXiv 1607.00133; with A frozen, FFA-LoRA, arXiv 2403.12313, section 3.
"""
import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flora import accountant
from flora.adapter import Adapters
from flora.client import TrainConfig
from flora.data.batches import steps_per_epoch
from flora.keystream import KEY_BYTES, normal
from flora.member import Member
from flora.segments import sent_to


class Examples:
    """The clipped gradients of a step, summed client by client in fp64, and the noise on them.

    The noise is drawn from config.example_key (None: from a key that nobody keeps) under the run, the client, the version, the
    start that was sent and the step: a step taken again has the same, one from another start has another. The parameters of a
    member hold what the optimiser works on, and its gradients.
    """

    def __init__(self, members: Sequence[Member], config: TrainConfig):
        self.members, self.clip, self.noise = members, config.example_clip, config.example_clip * config.example_noise
        self.batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self._key = config.example_key or secrets.token_bytes(KEY_BYTES)
        self._sums: dict[int, list[torch.Tensor]] = {}

    def begin(self, going: Sequence[int]) -> None:
        """A step of these members: nothing summed yet."""
        self._sums = {k: [torch.zeros_like(p, dtype=torch.float64) for p in self.members[k].parameters] for k in going}

    def add(self, k: int) -> None:
        """Takes in the gradient that member k's parameters hold, of one example. Waits for nothing."""
        mine = self.members[k].parameters
        pairs = [(total, p.grad.double()) for total, p in zip(self._sums[k], mine, strict=True) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for _, g in pairs])
        factor = (self.clip / norm).clamp(max=1.0)
        for total, g in pairs:
            total.add_(torch.where(norm.isfinite(), g * factor, 0.0))

    def finish(self, k: int) -> None:
        """Gives member k's parameters (Σ + noise) / b as their gradients."""
        member, totals = self.members[k], self._sums.pop(k)
        sizes, label = [total.numel() for total in totals], f"example/{member.place}/{member.taken}"
        if self.noise:
            drawn = sent_to(totals[0].device, normal(self._key, label, (sum(sizes),))).split(sizes)
            for total, own in zip(totals, drawn, strict=True):
                total.add_(own.view(total.shape), alpha=self.noise)
        for p, total in zip(member.parameters, totals, strict=True):
            p.grad = (total / self.batch).to(p.dtype)


def digest(start: Adapters | None, state: Mapping[str, Tensor] | None = None) -> str:
    """A hash of where training starts, and of the optimiser's state there: whoever is asked twice for one version from two starts
    must not draw the same noise twice."""
    found, tensors = hashlib.sha256(), dict(state or {})
    for name, a in (start or {}).items():
        tensors |= {f"{name}/A": a.A, f"{name}/B": a.B, f"{name}/scale": a.scale}
    for name, t in sorted(tensors.items()):
        found.update(f"{name}/{t.dtype}/{tuple(t.shape)}/".encode())
        found.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def uses_in_a_round(num_rows: int, config: TrainConfig, max_steps: int | None = None) -> int:
    """How many steps of a round one of num_rows examples can be in: one an epoch begun. max_steps: the client's own."""
    epoch = steps_per_epoch(num_rows, config.per_device_train_batch_size, config.gradient_accumulation_steps)
    steps = max_steps or config.max_steps or math.ceil(config.num_train_epochs * epoch)
    return math.ceil(steps / epoch)


def epsilon(config: TrainConfig, delta: float, uses: int) -> float:
    """ε of one example of a client at this delta after `uses` steps that it was in: in all rounds that the client took part in.

    It covers the adapters, not the metrics beside them. Raises ConfigError.
    """
    return accountant.epsilon(config.example_noise if config.example_clip else 0.0, delta, uses)

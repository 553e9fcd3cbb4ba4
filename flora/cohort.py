"""The clients of a round and the model they share: `fit` trains them all in one batch and gives back one Update each.

Their rows are concatenated and routed to their own ranks (packed.py), so the frozen base is read once for all of them. Two clients
never share a sequence, and the sum of the clients' mean losses is what is differentiated: every gradient is its client's own.

A client's training is a pure function of (base, start, its rows, its settings, seed, version): its order of rows, its fresh
ranks and its dropout masks are keyed by its name, never drawn from a shared stream. So a client trains to the same adapter, but for
the rounding of sums, alone or in company, and a client that is done or fails leaves the batch and takes nothing from the others.
(Dropout that the base model has of its own is drawn for the whole batch.)

The step is AdamW (betas 0.9, 0.999, eps 1e-8) on the mean loss over the labelled tokens of the whole optimiser step,
accumulation included; gradients are clipped by the client's own norm; the schedule restarts every round.
"""
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from flora.adapter import Adapter, Adapters, stack
from flora.budget import Budget, available
from flora.client import LocalClient, TrainConfig
from flora.clock import Clock
from flora.data.batches import steps_per_epoch, training_steps
from flora.errors import ConfigError, DataError, TrainingError
from flora.loop import Loop, OnStep
from flora.losses import CausalLM, Loss, Row
from flora.member import Member, starting_adapters
from flora.messages import Broadcast, Update
from flora.nn import applied, target_shapes
from flora.packed import MOST_CLIENTS, MOST_RANKS, Packed, joined
from flora.packing import device_of, packable, traits_of
from flora.seeds import derive
from flora.versions import MergeConfig, bring_to

log = logging.getLogger(__name__)


class Cohort:
    """Clients that share one frozen base.

    model: a causal LM (input_ids, attention_mask -> .logits), or what train_config.loss takes; targets: which modules carry
    adapters, as in flora.attach; max_tokens_per_batch: tokens that one pass may hold, of at least one row ("auto": measured once,
    by the memory of the device; at most 1,024 on a CPU, where more is hardly faster); where the memory does not suffice it is
    halved, and the step taken again. Clients whose steps go into one pass train together, the others after them. merge_config: how
    a broadcast's merge reaches the base. Clients need names of their own.
    After fit, failures says which clients gave no update, and why; seconds, what each phase took; rate, tokens a second of all
    clients together (tokens_per_second: while it runs). Raises ConfigError, TargetError.
    """

    def __init__(self, model: nn.Module, clients: Sequence[LocalClient], train_config: TrainConfig,
                 targets: str | Sequence[str] = "all-linear", max_tokens_per_batch: int | Literal["auto"] = "auto",
                 merge_config: MergeConfig | None = None):
        names = [client.name for client in clients]
        if len(set(names)) != len(names):
            raise ConfigError(f"expected clients with different names; got {names}")
        if max_tokens_per_batch != "auto" and max_tokens_per_batch < 1:
            raise ConfigError(f'max_tokens_per_batch: expected "auto" or at least 1; got {max_tokens_per_batch}')
        self.model, self.clients, self.train_config, self.targets = model, list(clients), train_config, targets
        self.max_tokens_per_batch, self.merge_config = max_tokens_per_batch, merge_config
        self._budget = Budget(model, max_tokens_per_batch)
        self._loss = train_config.loss or CausalLM()
        self.shapes = target_shapes(model, targets)
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.rate, self._tokens, self._began = 0.0, 0, 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on since fit began, all clients together, over the seconds since; `rate` is that of a whole fit."""
        return self._tokens / max(1e-9, time.perf_counter() - self._began)

    def fit(self, broadcast: Broadcast, frozen: Adapters | Sequence[Adapters | None] | None = None,
            on_step: OnStep | None = None) -> list[Update]:
        """Brings the base to the broadcast's version, trains every client from its start, and returns their updates.

        frozen: ranks that each client sees and does not train: for all, or one (or None) a client. on_step(client, step, steps,
        loss) is called after each step. Order of clients kept; a client whose loss is not finite, or that has no labelled token,
        is left out and named in failures. No adapter stays attached. Raises RunError for a base of another version.
        """
        clock = Clock(device_of(self.model))
        with clock("merge"):
            bring_to(self.model, broadcast, self.merge_config)
        per_client = [frozen] * len(self.clients) if frozen is None or isinstance(frozen, Mapping) else list(frozen)
        if len(per_client) != len(self.clients):
            raise ConfigError(f"frozen: expected one entry a client ({len(self.clients)}); got {len(per_client)}")
        self.failures, self._tokens, self._began, trained = {}, 0, time.perf_counter(), {}
        members = []
        with clock("setup"):
            for client, ranks in zip(self.clients, per_client, strict=True):
                try:
                    members.append(self._member(client, broadcast, ranks))
                except DataError as error:
                    self._fail(client.name, error)
        with self._mode():
            for group in groups(members, self._budget.tokens, available(device_of(self.model))):
                trained |= self._fit_group(group, broadcast, on_step, clock)
        self.seconds = clock.read()
        took, self.rate = time.perf_counter() - self._began, self.tokens_per_second
        self.failures = {client.name: self.failures[client.name] for client in self.clients if client.name in self.failures}
        return [Update(trained[m.client.name], len(m.client.rows), {
            "loss": sum(m.losses) / len(m.losses), "last_loss": m.losses[-1], "steps": len(m.losses), "tokens": m.tokens,
            "seconds": took * m.tokens / self._tokens, "tokens_per_second": self.rate}, broadcast.version, m.client.name)
            for m in members if m.client.name in trained]

    def _fail(self, name: str, error: Exception) -> None:
        self.failures[name] = str(error)
        log.warning("client %s is left out of this round: %s", name, error)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """The model as it trains, and afterwards as it was: mode, checkpointing, attention."""
        model, was_training = self.model, self.model.training
        packs = self._loss.packs and traits_of(model).packs
        on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        switch = self.train_config.gradient_checkpointing and not on
        kind = next((kind for kind in ("activation", "gradient") if hasattr(model, f"{kind}_checkpointing_enable")), None)
        if switch and kind is None:                             # transformers 6 has the first name, 5 the second
            raise ConfigError(f"gradient_checkpointing: expected a model of transformers, which can; got {type(model).__name__}")
        try:
            model.train()
            if switch:
                getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            with packable(model) if packs else contextlib.nullcontext():
                yield
        finally:
            if switch:
                getattr(model, f"{kind}_checkpointing_disable")()
            model.train(was_training)

    def _member(self, client: LocalClient, broadcast: Broadcast, frozen: Adapters | None) -> Member:
        """A client's part in this round. Raises DataError where it has no labelled token."""
        config, version = self.train_config, broadcast.version
        own = self.shapes if client.layers is None else target_shapes(self.model, self.targets, client.layers)
        held = client.start if client.start is not None else broadcast.start
        asleep: dict[str, list[Adapter]] = {}
        for name, a in [*((n, a) for n, a in (held or {}).items() if n not in own), *(frozen or {}).items()]:
            asleep.setdefault(name, []).append(a)
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        epoch = steps_per_epoch(len(client.rows), size, accumulation)
        return Member(
            client, lambda: starting_adapters(client, held, own, config.seed, version),
            client.rank * sum(map(sum, own.values())),
            {name: parts[0] if len(parts) == 1 else stack([a.to("cpu") for a in parts]) for name, parts in asleep.items()},
            training_steps(client.rows, size, accumulation, config.shuffle, config.seed, (client.name, version), self._loss.terms),
            client.max_steps or config.max_steps or math.ceil(config.num_train_epochs * epoch),
            client.learning_rate or config.learning_rate, derive(config.seed, client.name, version, "dropout"),
            list(self.shapes).index(next(iter(own))), _tokens_a_step(client.rows, size * accumulation, self._loss))

    def _fit_group(self, members: Sequence[Member], broadcast: Broadcast, on_step: OnStep | None,
                   clock: Clock) -> dict[str, dict[str, Adapter]]:
        """Trains clients together; their adapters, by name, but for those that failed."""
        config, model, device = self.train_config, self.model, device_of(self.model)
        dtype = None if config.adapter_dtype is None else getattr(torch, config.adapter_dtype)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.ExitStack() as attached:
            with clock("setup"):
                starts, asleep = [m.begin() for m in members], [m.asleep for m in members]
                layers = attached.enter_context(applied(model, joined(starts, asleep), config.lora_dropout, dtype))
                packed = Packed(layers, starts, asleep, broadcast.train)
                del starts                                      # the layers hold copies
            Loop(model, packed, members, config, self._budget, clock).run(
                on_step, self._count, derive(config.seed, broadcast.version, "torch"))
            with clock("setup"):
                adapters = [packed.adapters(k) for k in range(len(members))]
                for member in members:
                    member.release()
        out = {}
        for member, trained in zip(members, adapters, strict=True):
            if not member.failed and not all(bool(torch.isfinite(f).all()) for a in trained.values() for f in (a.A, a.B)):
                member.failed = "expected finite factors after the last step; got NaN or infinity. Lower its learning rate."
            if member.failed:
                self._fail(member.client.name, TrainingError(member.failed))
            else:
                out[member.client.name] = trained
        return out

    def _count(self, tokens: int) -> None:
        self._tokens += tokens


def _tokens_a_step(rows: Sequence[Row], count: int, loss: Loss) -> int:
    """About how many tokens a step of so many rows has, by the first rows."""
    some = [sum(len(part["input_ids"]) for part in loss.sequences(rows[i])) for i in range(min(64, len(rows)))]
    return round(sum(some) / len(some) * min(count, len(rows)))


def groups(members: Sequence[Member], budget: int, memory: float) -> Iterator[list[Member]]:
    """Clients that train together: those whose steps one pass holds, of like depth and number of steps; as many as a kernel takes,
    and no more than half of the memory (bytes) can hold the factors, gradients and optimiser states of. Their order is kept.

    So a client's step is one pass, or passes of its own, and no pass carries the gradients of clients that have no rows in it.
    Groups have about as many tokens a step each.
    """
    def size(member: Member) -> tuple[int, int, int, int]:
        """Tokens of a step, ranks, bytes, clients."""
        return member.tokens_a_step, member.client.rank, 16 * member.numbers, 1

    order = sorted(range(len(members)), key=lambda k: (members[k].depth, members[k].num_steps, k))
    tokens = sum(member.tokens_a_step for member in members)
    share = tokens / max(1, -(-tokens // budget))
    group: list[int] = []
    total = (0, 0, 0, 0)
    for k in order:
        following = tuple(a + b for a, b in zip(total, size(members[k]), strict=True))
        most = (budget, MOST_RANKS, memory / 2, MOST_CLIENTS)
        enough = total[0] + members[k].tokens_a_step / 2 > share
        if group and (enough or any(a > b for a, b in zip(following, most, strict=True))):
            yield [members[i] for i in sorted(group)]
            group, following = [], size(members[k])
        group.append(k)
        total = following
    if group:
        yield [members[i] for i in sorted(group)]

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
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from flora.adapter import Adapter, Adapters, stack
from flora.budget import Budget
from flora.client import LocalClient, TrainConfig
from flora.clock import Clock
from flora.data.batches import steps_per_epoch, training_steps
from flora.errors import ConfigError, DataError, TrainingError
from flora.frames import frame
from flora.loop import Loop, OnStep
from flora.losses import CausalLM
from flora.member import Member, starting_adapters
from flora.messages import Broadcast, Update
from flora.nn import applied, target_shapes
from flora.packed import MOST_CLIENTS, MOST_RANKS, Packed, joined
from flora.packing import device_of, packable, traits_of
from flora.per_example import digest
from flora.seeds import derive
from flora.steps import tokens_a_step
from flora.versions import MergeConfig, bring_to
from flora.whole import Whole, own_weights

if TYPE_CHECKING:
    from flora.distributed import Team

log = logging.getLogger(__name__)

Trained = tuple[dict[str, Adapter], dict[str, torch.Tensor] | None]     # a client's adapters; its weights, where it trained those
States = MutableMapping[str, dict[str, torch.Tensor]]


class Cohort:
    """Clients that share one frozen base.

    model: a causal LM (input_ids, attention_mask -> .logits), or what train_config.loss takes; targets: which modules carry
    adapters, as in flora.attach; max_tokens_per_batch: tokens that one pass may hold, of at least one row ("auto": measured once,
    by the memory of the device; at most 1,024 on a CPU, where more is hardly faster; a Budget: a run's); where the memory does not
    suffice it is halved, and the step taken again. Clients whose steps go into one pass train together, the others after them.
    merge_config: how a broadcast's merge reaches the base. Clients need names of their own. optimizer_states: AdamW's state by
    client and "<layer>/<what trains>/<step|exp_avg|exp_avg_sq>", on the CPU: fit goes on from it and writes it, for clients that
    gave an update; a tensor of another shape starts anew (None: every round does).
    team: the processes that share the clients out among them (distributed.py; None: this one trains all).
    After fit, failures says which clients gave no update, and why; seconds, what each phase took; rate, tokens a second of all
    clients together (tokens_per_second: while it runs). Raises ConfigError, TargetError.
    """

    def __init__(self, model: nn.Module, clients: Sequence[LocalClient], train_config: TrainConfig,
                 targets: str | Sequence[str] = "all-linear", max_tokens_per_batch: int | Literal["auto"] | Budget = "auto",
                 merge_config: MergeConfig | None = None, optimizer_states: States | None = None):
        names = [client.name for client in clients]
        if len(set(names)) != len(names):
            raise ConfigError(f"expected clients with different names; got {names}")
        budget = max_tokens_per_batch
        if not isinstance(budget, Budget):
            if budget != "auto" and budget < 1:
                raise ConfigError(f'max_tokens_per_batch: expected "auto" or at least 1; got {budget}')
            budget = Budget(model, budget)
        self.model, self.clients, self.train_config, self.targets = model, list(clients), train_config, targets
        self.max_tokens_per_batch, self.merge_config, self.optimizer_states = max_tokens_per_batch, merge_config, optimizer_states
        self._budget = budget
        self._loss = train_config.loss or CausalLM()
        self.shapes = target_shapes(model, targets)
        self.team: Team | None = None
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.rate, self._tokens, self._began = 0.0, 0, 0.0
        self._own: dict[str, tuple[int, float]] = {}            # tokens of a client, and when those it trains with began

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on since fit began, all clients together, over the seconds since; `rate` is that of a whole fit."""
        return self._tokens / max(1e-9, time.perf_counter() - self._began)

    def speed(self, name: str) -> float:
        """A client's own tokens a second while it trains, since those it trains with began; 0: it trains elsewhere."""
        tokens, began = self._own.get(name, (0, 0.0))
        return tokens / max(1e-9, time.perf_counter() - began)

    def fit(self, broadcast: Broadcast, frozen: Adapters | Sequence[Adapters | None] | None = None,
            on_step: OnStep | None = None) -> list[Update]:
        """Brings the base to the broadcast's version, trains every client from its start, and returns their updates.

        frozen: ranks that each client sees and does not train: for all, or one (or None) a client. on_step(client, step, steps,
        loss) is called after each step, on a GPU once the next one is under way. Order of clients kept; a client whose loss is not
        finite, or that has no labelled token, is left out and named in failures. No adapter stays attached; weights that trained
        (broadcast.train "weight", one client after another) are put back. Raises RunError for a base of another version,
        ConfigError for what does not go together.
        """
        self._refuse(broadcast, frozen)
        views = [frozen] * len(self.clients) if frozen is None or isinstance(frozen, Mapping) else list(frozen)
        if len(views) != len(self.clients):
            raise ConfigError(f"frozen: expected one entry a client ({len(self.clients)}); got {len(views)}")
        return self.team.fit(self, broadcast, views, on_step) if self.team else self.fit_here(broadcast, views, on_step)

    def fit_here(self, broadcast: Broadcast, views: Sequence[Adapters | None], on_step: OnStep | None = None) -> list[Update]:
        """As fit (on_step too), in this process alone. views: the frozen ranks of each client."""
        clock = Clock(device_of(self.model))
        with clock("merge"):
            bring_to(self.model, broadcast, self.merge_config)
        self.failures, self._tokens, self._began = {}, 0, time.perf_counter()
        trained: dict[str, Any] = {}
        members = []
        with clock("setup"):
            for client, ranks in zip(self.clients, views, strict=True):
                try:
                    members.append(self._member(client, broadcast, ranks))
                except DataError as error:
                    self._fail(client.name, error)
        with self._mode():
            for group in self._groups(members, broadcast):
                trained |= self._fit_group(group, broadcast, on_step, clock)
        self.seconds = clock.read()
        took, self.rate = time.perf_counter() - self._began, self.tokens_per_second
        self.failures = {client.name: self.failures[client.name] for client in self.clients if client.name in self.failures}
        return [Update(trained[m.client.name][0], len(m.client.rows), {
            "loss": sum(m.losses) / len(m.losses), "last_loss": m.losses[-1], "steps": len(m.losses), "tokens": m.tokens,
            "seconds": took * m.tokens / max(1, self._tokens), "tokens_per_second": self.rate}, broadcast.version, m.client.name,
            trained[m.client.name][1]) for m in members if m.client.name in trained]

    def _refuse(self, broadcast: Broadcast, frozen: Adapters | Sequence[Adapters | None] | None) -> None:
        """Raises ConfigError where the settings ask for what this broadcast does not train."""
        config, train = self.train_config, broadcast.train
        for name in ("adalora_keep", "rank_decay"):
            if getattr(config, name) and train != "AB":
                raise ConfigError(f'{name}: expected a broadcast that trains "AB", whose ranks can be pruned; got one that trains '
                                  f'"{train}". Leave {name} out, or take another strategy.')
        if config.example_clip and train != "B":
            raise ConfigError(f'example_clip: expected a broadcast that trains "B" alone, as noise on A and on B multiplies in '
                              f'their product; got one that trains "{train}". Use strategy ffa or fedsvd, or leave it out.')
        if train == "weight" and (frozen or broadcast.start or any(client.start for client in self.clients)):
            raise ConfigError("expected neither a start nor frozen ranks with full fine-tuning, which has no adapters; got some. "
                              "Merge them into the base first.")

    def _groups(self, members: Sequence[Member], broadcast: Broadcast) -> Iterator[list[Member]]:
        """Who trains together: clients that train weights cannot."""
        if broadcast.train == "weight":
            return ([member] for member in members)
        return groups(members, self._budget.tokens, self._budget.room())

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
        if broadcast.train == "core" and any(held is None or name not in held or held[name].rank != client.rank for name in own):
            raise ConfigError(f"client {client.name!r}: expected a start of its rank ({client.rank}) in all layers, as the core is "
                              "(rank, rank); got another. Give all clients the rank that the run began with.")
        asleep: dict[str, list[Adapter]] = {}
        for name, a in [*((n, a) for n, a in (held or {}).items() if n not in own), *(frozen or {}).items()]:
            asleep.setdefault(name, []).append(a)
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        epoch = steps_per_epoch(len(client.rows), size, accumulation)
        kept = (self.optimizer_states or {}).get(client.name)
        units = (lambda row: 1) if config.example_clip else self._loss.terms            # which rows have labels must not show
        return Member(
            client, lambda: starting_adapters(client, held, own, config.seed, version),
            client.rank * sum(map(sum, own.values())),
            {name: parts[0] if len(parts) == 1 else stack([a.to("cpu") for a in parts]) for name, parts in asleep.items()},
            training_steps(client.rows, size, accumulation, config.shuffle, config.seed, (client.name, version), units),
            client.max_steps or config.max_steps or math.ceil(config.num_train_epochs * epoch),
            client.learning_rate or config.learning_rate, derive(config.seed, client.name, version, "dropout"),
            list(self.shapes).index(next(iter(own))), tokens_a_step(client.rows, size * accumulation, self._loss), list(own),
            kept, f"{broadcast.run}/{client.name}/{version}/{digest(held, kept)}" if config.example_clip else "")

    def _fit_group(self, members: Sequence[Member], broadcast: Broadcast, on_step: OnStep | None,
                   clock: Clock) -> dict[str, Trained]:
        """Trains clients together; what they trained, by name, but for those that failed."""
        config, model, device = self.train_config, self.model, device_of(self.model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.ExitStack() as attached:
            with clock("setup"):
                packed = attached.enter_context(self._attached(members, broadcast))
            self._own |= {member.client.name: (0, time.perf_counter()) for member in members}
            Loop(model, packed, members, config, self._budget, clock).run(
                on_step, self._count, derive(config.seed, broadcast.version, "torch"))
            with clock("setup"):
                found = [(packed.adapters(k), packed.weights(k)) for k in range(len(members))]
                states = [None if self.optimizer_states is None or m.failed else m.state() for m in members]
                for member in members:
                    member.release()
        out = {}
        for member, (adapters, weights), state in zip(members, found, states, strict=True):
            numbers = [*(f for a in adapters.values() for f in (a.A, a.B)), *(weights or {}).values()]
            if not member.failed and not all(bool(torch.isfinite(f).all()) for f in numbers):
                member.failed = "expected finite factors after the last step; got NaN or infinity. Lower its learning rate."
            if member.failed:
                self._fail(member.client.name, TrainingError(member.failed))
                continue
            out[member.client.name] = member.pruned(adapters, config.rank_decay) if config.rank_decay else adapters, weights
            if state is not None and self.optimizer_states is not None:
                self.optimizer_states.setdefault(member.client.name, {}).update(state)
        return out

    @contextlib.contextmanager
    def _attached(self, members: Sequence[Member], broadcast: Broadcast) -> Iterator[Packed | Whole]:
        """The model with what these clients train in its place; afterwards as it was."""
        config = self.train_config
        if broadcast.train == "weight":
            with own_weights(self.model, members[0].layers) as whole:
                yield whole
            return
        dtype = None if config.adapter_dtype is None else getattr(torch, config.adapter_dtype)
        frame_of = functools.cache(lambda shape, rank, layer: frame(shape, rank, broadcast.frame, layer)[0])
        starts, asleep = [m.begin() for m in members], [m.asleep for m in members]
        with applied(self.model, joined(starts, asleep), config.lora_dropout, dtype) as layers:
            packed = Packed(layers, starts, asleep, {"core": "A"}.get(broadcast.train, broadcast.train),
                            lambda k, slots: members[k].form(slots, broadcast, config, frame_of))
            del starts                                          # the layers hold copies
            yield packed

    def _count(self, name: str, tokens: int) -> None:
        self._tokens += tokens
        had, began = self._own[name]
        self._own[name] = had + tokens, began


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
    total: tuple[int, ...] = (0, 0, 0, 0)
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

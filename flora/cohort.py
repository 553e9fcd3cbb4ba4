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
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from flora import ops
from flora.adapter import Adapter, Adapters, fresh_adapters, stack, truncate
from flora.client import LocalClient, TrainConfig, learning_rate_factor
from flora.data.batches import collate, num_label_tokens, steps_per_epoch, training_steps
from flora.errors import ConfigError, DataError, TrainingError
from flora.evaluate import device_of, sequence_losses
from flora.messages import Broadcast, Update
from flora.nn import applied, target_shapes
from flora.packed import Packed, joined
from flora.seeds import derive
from flora.versions import MergeConfig, bring_to

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Sequence[int]]]
OnStep = Callable[[str, int, int, float], None]
# Of a pass. On 2 cores 512 was the fastest of 256 to 2,048, at half the memory of 2,048.
TOKENS = {"cpu": 512, "cuda": 4096}


class Cohort:
    """Clients that share one frozen base.

    model: a causal LM (input_ids, attention_mask -> .logits); targets: which modules carry adapters, as in flora.attach;
    max_tokens_per_batch: padded tokens that one pass may hold, of at least one sequence ("auto": 512 on a CPU, 4,096 on a GPU);
    where the memory does not suffice it is halved, and the step taken again. merge_config: how a broadcast's merge reaches the
    base. Clients need names of their own.
    After fit, failures says which clients gave no update, and why. Raises ConfigError, TargetError.
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
        self._budget = TOKENS.get(device_of(model).type, 4096) if max_tokens_per_batch == "auto" else max_tokens_per_batch
        self.shapes = target_shapes(model, targets)
        self.failures: dict[str, str] = {}

    def fit(self, broadcast: Broadcast, frozen: Adapters | Sequence[Adapters | None] | None = None,
            on_step: OnStep | None = None) -> list[Update]:
        """Brings the base to the broadcast's version, trains every client from its start, and returns their updates.

        frozen: ranks that each client sees and does not train: for all, or one (or None) a client. on_step(client, step, steps,
        loss) is called after each step. Order of clients kept; a client whose loss is not finite, or that has no labelled token,
        is left out and named in failures. No adapter stays attached. Raises RunError for a base of another version.
        """
        bring_to(self.model, broadcast, self.merge_config)
        per_client = [frozen] * len(self.clients) if frozen is None or isinstance(frozen, Mapping) else list(frozen)
        if len(per_client) != len(self.clients):
            raise ConfigError(f"frozen: expected one entry a client ({len(self.clients)}); got {len(per_client)}")
        self.failures, trained = {}, {}
        was_training = self.model.training
        members = []
        for client, ranks in zip(self.clients, per_client, strict=True):
            try:
                members.append(self._member(client, broadcast, ranks))
            except DataError as error:
                self._fail(client.name, error)
        try:
            for group in _groups(members):
                trained |= {update.client: update for update in self._fit_group(group, broadcast, on_step)}
        finally:
            self.model.train(was_training)
        self.failures = {client.name: self.failures[client.name] for client in self.clients if client.name in self.failures}
        return [trained[client.name] for client in self.clients if client.name in trained]

    def _fail(self, name: str, error: Exception) -> None:
        self.failures[name] = str(error)
        log.warning("client %s is left out of this round: %s", name, error)

    def _member(self, client: LocalClient, broadcast: Broadcast, frozen: Adapters | None) -> "_Member":
        """A client's part in this round. Raises DataError where it has no labelled token."""
        config, version = self.train_config, broadcast.version
        own = self.shapes if client.layers is None else target_shapes(self.model, self.targets, client.layers)
        held = client.start if client.start is not None else broadcast.start
        asleep: dict[str, list[Adapter]] = {}
        for name, a in [*((n, a) for n, a in (held or {}).items() if n not in own), *(frozen or {}).items()]:
            asleep.setdefault(name, []).append(a)
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        epoch = steps_per_epoch(len(client.rows), size, accumulation)
        return _Member(
            client, starting_adapters(client, held, own, config.seed, version),
            {name: parts[0] if len(parts) == 1 else stack([a.to("cpu") for a in parts]) for name, parts in asleep.items()},
            training_steps(client.rows, size, accumulation, config.shuffle, config.seed, (client.name, version)),
            client.max_steps or config.max_steps or math.ceil(config.num_train_epochs * epoch),
            client.learning_rate or config.learning_rate, derive(config.seed, client.name, version, "dropout"))

    def _fit_group(self, members: Sequence["_Member"], broadcast: Broadcast, on_step: OnStep | None) -> Iterator[Update]:
        """Trains clients together, a step of each at a time; a client that is done or fails leaves the batch."""
        config, model, began = self.train_config, self.model, time.perf_counter()
        starts, asleep = [m.start for m in members], [m.asleep for m in members]
        devices = [device_of(model)] if device_of(model).type == "cuda" else []
        with torch.random.fork_rng(devices), applied(model, joined(starts, asleep), config.lora_dropout) as layers:
            torch.manual_seed(derive(config.seed, broadcast.version, "torch"))
            packed = Packed(layers, starts, asleep, broadcast.train)
            for k, member in enumerate(members):
                member.prepare(packed.parameters[k], config)
            model.train()
            while active := [k for k, m in enumerate(members) if not m.failed and len(m.losses) < m.num_steps]:
                self._step(packed, members, active, on_step)
            adapters = [packed.adapters(k) for k in range(len(members))]
        seconds, tokens = time.perf_counter() - began, sum(m.tokens for m in members)
        for member, trained in zip(members, adapters, strict=True):
            if not member.failed and not all(bool(torch.isfinite(f).all()) for a in trained.values() for f in (a.A, a.B)):
                member.failed = "expected finite factors after the last step; got NaN or infinity. Lower its learning rate."
            if member.failed:
                self._fail(member.client.name, TrainingError(member.failed))
                continue
            metrics = {"loss": sum(member.losses) / len(member.losses), "last_loss": member.losses[-1],
                       "steps": len(member.losses), "tokens": member.tokens, "seconds": seconds * member.tokens / tokens,
                       "tokens_per_second": tokens / seconds}
            yield Update(trained, len(member.client.rows), metrics, broadcast.version, member.client.name)

    def _step(self, packed: Packed, members: Sequence["_Member"], active: Sequence[int], on_step: OnStep | None) -> None:
        """One optimiser step of every active client."""
        config = self.train_config
        batches = {k: [row for batch in next(members[k].steps) for row in batch] for k in active}
        losses = self._gradients(packed, members, batches)
        for k in active:
            member, loss = members[k], losses[k]
            norm = float(torch.nn.utils.clip_grad_norm_(packed.parameters[k], config.max_grad_norm or math.inf))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                member.failed = (f"expected a finite loss; got {loss} (gradient norm {norm}) at step {len(member.losses) + 1} of "
                                 f"{member.num_steps}. Lower its learning rate (now {member.learning_rate}) or look at its rows.")
                continue
            member.update(loss, config)
            member.tokens += sum(len(row["input_ids"]) for row in batches[k])
            if on_step is not None:
                on_step(member.client.name, len(member.losses), member.num_steps, loss)

    def _gradients(self, packed: Packed, members: Sequence["_Member"], batches: Mapping[int, Rows]) -> dict[int, float]:
        """Every client's gradient of its own mean loss over the labelled tokens of its step; the losses.

        What is differentiated is the sum of the clients' means: it falls apart into theirs, as no row meets another's ranks.
        """
        labelled = {k: num_label_tokens(rows) for k, rows in batches.items()}
        places = [_Place(k, i, row) for k, rows in batches.items() for i, row in enumerate(rows) if num_label_tokens([row])]
        while True:
            try:
                return self._accumulate(packed, members, places, labelled)
            except RuntimeError as error:                               # torch.OutOfMemoryError is one; the CPU has none of its own
                longest = max(len(place.row["input_ids"]) for place in places)
                if not re.search("out of memory|can't allocate memory|not enough memory", str(error)) or self._budget <= longest:
                    raise
                self._budget = max(longest, self._budget // 2)
                log.warning("out of memory: passes hold at most %d tokens from now on, and the step is taken again", self._budget)
                if device_of(self.model).type == "cuda":
                    torch.cuda.empty_cache()

    def _accumulate(self, packed: Packed, members: Sequence["_Member"], places: Sequence["_Place"],
                    labelled: Mapping[int, int]) -> dict[int, float]:
        """The gradients and losses of a step, pass by pass."""
        config, device = self.train_config, device_of(self.model)
        losses = dict.fromkeys(labelled, 0.0)
        packed.zero_grad()
        for part in passes(places, self._budget):
            batch = {name: t.to(device) for name, t in collate([place.row for place in part], config.pad_token_id).items()}
            length = batch["input_ids"].shape[1]
            keys = None
            if config.lora_dropout:
                keys = torch.cat([ops.row_keys(ops.row_keys(members[p.client].key, len(members[p.client].losses)), p.sequence,
                                               torch.arange(length)) for p in part]).to(device)
            packed.route([length * sum(p.client == k for p in part) for k in range(packed.count)], keys)
            per_sequence = sequence_losses(self.model, batch)
            weights = torch.tensor([1.0 / labelled[p.client] for p in part], device=device)
            (per_sequence * weights).sum().backward()
            for place, loss in zip(part, per_sequence.detach().tolist(), strict=True):
                losses[place.client] += loss / labelled[place.client]
        return losses


@dataclass
class _Member:
    """A client in a round: where it starts, what it sees, its steps, and how far it came."""
    client: LocalClient
    start: Adapters
    asleep: Adapters
    steps: Iterator[Sequence[Rows]]
    num_steps: int
    learning_rate: float
    key: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: str = ""

    def prepare(self, parameters: Sequence[Tensor], config: TrainConfig) -> None:
        self.optimizer = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=config.weight_decay, fused=True)

    def update(self, loss: float, config: TrainConfig) -> None:
        """A step of AdamW on its own factors, with its own schedule."""
        factor = learning_rate_factor(len(self.losses), self.num_steps, config.warmup_steps, config.lr_scheduler_type)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.losses.append(loss)


class _Place(NamedTuple):
    """A row of a step: whose it is, and its number among that client's rows of the step, which keys its dropout."""
    client: int
    sequence: int
    row: Mapping[str, Sequence[int]]


def _groups(members: Sequence[_Member], ranks: int = 1024, count: int = 256) -> Iterator[list[_Member]]:
    """Clients that train together: as many as what a kernel takes, in order."""
    group: list[_Member] = []
    for member in members:
        if group and (len(group) == count or sum(m.client.rank for m in group) + member.client.rank > ranks):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def passes(places: Sequence[_Place], budget: int) -> Iterator[list[_Place]]:
    """Cuts a step into passes of at most so many padded tokens, of at least one sequence; sequences of like length together.

    At most a quarter of a pass is padding, but for small ones. In a pass rows lie client by client.
    """
    ordered = sorted(places, key=lambda place: -len(place.row["input_ids"]))
    part: list[_Place] = []
    for place in ordered:
        longest = len(part[0].row["input_ids"]) if part else 0
        full = part and longest * (len(part) + 1) > budget
        ragged = part and len(place.row["input_ids"]) < 0.75 * longest and longest * len(part) >= 256
        if full or ragged:
            yield sorted(part, key=lambda p: (p.client, p.sequence))
            part = []
        part.append(place)
    if part:
        yield sorted(part, key=lambda p: (p.client, p.sequence))


def starting_adapters(client: LocalClient, start: Adapters | None, own: Mapping[str, tuple[int, int]], seed: int,
                      version: int) -> dict[str, Adapter]:
    """Where a client's training starts: the start cut to its rank, its scale kept, or filled up with fresh ranks.

    Fresh ranks (A random, B = 0, the client's own alpha / rank) are drawn from (seed, client, version, layer).
    """
    fresh = fresh_adapters(own, client.rank, client.alpha, seed, client.name, version, "fresh")
    out = {}
    for name, drawn in fresh.items():
        given = (start or {}).get(name)
        if given is None:
            out[name] = drawn
        elif given.rank >= client.rank:
            out[name] = truncate(given, client.rank)
        else:
            out[name] = stack([given.to("cpu"), Adapter(drawn.A[given.rank:], drawn.B[:, given.rank:], drawn.scale[given.rank:])])
    return out

"""The steps of clients that train together: passes, gradients, one optimiser a client."""
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flora import ops
from flora.budget import Budget
from flora.client import TrainConfig
from flora.clock import Clock
from flora.losses import CausalLM
from flora.member import Member
from flora.packed import Packed
from flora.packing import device_of, line, traits_of
from flora.per_example import Examples
from flora.seeds import derive
from flora.segments import sent_to
from flora.steps import Loader, Pass, Place, Reading
from flora.whole import Whole

OnStep = Callable[[str, int, int, float], None]


class Loop:
    """Takes every member through its steps, a step of each at a time, on a model that holds what `packed` trains.

    A member that is done or fails leaves the batch. Nothing that a step does waits for the device: its losses and norms are read
    when it is over, on a GPU once the next step's gradients have been asked for, so that the GPU always has work. on_step and the
    leaving of a member that failed are so late by one step there.
    """

    def __init__(self, model: nn.Module, packed: Packed | Whole, members: Sequence[Member], config: TrainConfig, budget: Budget,
                 clock: Clock):
        self.model, self.packed, self.members, self.config, self.budget, self.clock = model, packed, members, config, budget, clock
        self.device, self.loss = device_of(model), config.loss or CausalLM()
        self.packs = self.loss.packs and traits_of(model).packs
        self._unread: tuple[dict[int, int], Reading] | None = None
        self.examples = Examples(members, config) if config.example_clip else None
        for k, member in enumerate(members):
            member.prepare(packed.parameters[k], config)

    def run(self, on_step: OnStep | None, count: Callable[[str, int], None], seed: int) -> None:
        """All steps, the batches of the next one being made meanwhile. count: told the tokens of each client's step; seed: of the
        dropout that the model has of its own."""
        self._seed, self._steps = seed, 0
        with Loader(self.loss, self.packs, self.config.pad_token_id, self.device, self.examples is not None) as loader:
            due, first, self._told = self._begin(loader), True, (on_step, count)
            while due:
                with self.clock("data"):
                    places, parts = loader.take()
                if first and places:
                    self._measure(places, loader)
                    torch.manual_seed(seed)
                going, held, first = [k for k in due if not self.members[k].failed], loader.budget, False
                due = self._begin(loader)
                if len(going) < len({p.client for p in places}) or held != self.budget.tokens:
                    places = [p for p in places if p.client in going]
                    parts = loader.make(places, self.budget.tokens)
                if places or (going and self.examples):        # which rows have labels must not show in the number of steps
                    self._step(going, places, parts, loader)
        self._settle()

    def _begin(self, loader: Loader) -> list[int]:
        """Begins to make the next step of all members that have one; who they are."""
        due = [k for k, m in enumerate(self.members) if not m.failed and m.drawn < m.num_steps]
        if due:
            loader.prefetch(lambda: [place for k in due for place in self.members[k].draw(k, self.loss)], self.budget.tokens)
        return due

    def _measure(self, places: Sequence[Place], loader: Loader) -> None:
        """Bounds the budget by what the shortest row keeps."""
        shortest = min(places, key=lambda p: p.tokens)
        [one] = map(loader.to_device, loader.make([shortest], shortest.tokens))
        self.budget.measure(lambda: self._forward(one), shortest.tokens, self.config.gradient_checkpointing)

    def _step(self, going: Sequence[int], places: Sequence[Place], parts: Sequence[Pass], loader: Loader) -> None:
        """One optimiser step of every member that goes on."""
        longest = max((p.tokens for p in places), default=0)
        while (losses := self._tried(going, parts, loader, longest)) is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            parts = loader.make(places, self.budget.tokens)
        self._settle()
        self._steps += 1
        with self.clock("optimizer"):
            norms = torch.zeros_like(losses)
            for k in going:
                self._take(k)
                self.members[k].pull(self.config.proximal_mu)
                norms[k] = self.members[k].norm()
                self.members[k].update(norms[k], self.config)
                self.packed.write(k)
            tokens = {k: sum(p.tokens for p in places if p.client == k) for k in going}
            self._unread = tokens, Reading(torch.stack([losses, norms]))
        if self.device.type != "cuda":
            self._settle()

    def _settle(self) -> None:
        """Reads what the step before last found: counts it, tells of it, and who has failed."""
        if self._unread is None:
            return
        (tokens, reading), self._unread = self._unread, None
        (on_step, count), (losses, norms) = self._told, reading.read()
        for k in tokens:
            member = self.members[k]
            if not member.failed and member.judge(losses[k], norms[k], tokens[k]):
                count(member.client.name, tokens[k])
                if on_step is not None:
                    on_step(member.client.name, len(member.losses), member.num_steps, losses[k])

    def _tried(self, going: Sequence[int], parts: Sequence[Pass], loader: Loader, longest: int) -> Tensor | None:
        """The losses of a step whose gradients have been computed; None: memory did not suffice, and passes hold less from now on.
        What the failed pass held is let go with this call, as the error holds it till then. longest: tokens of a row."""
        try:
            return self._example_gradients(going, parts, loader) if self.examples else self._gradients(parts, loader)
        except RuntimeError as error:
            self.budget.halve(longest, error)
            return None

    def _gradients(self, parts: Sequence[Pass], loader: Loader) -> Tensor:
        """Every client's gradient of its own mean loss over the terms of its step; the losses, by client, in fp64.

        What is differentiated is the sum of the clients' means: it falls apart into theirs, as no row meets another's ranks.
        """
        losses = torch.zeros(self.packed.count, dtype=torch.float64, device=self.device)
        self.packed.zero_grad()
        for part in parts:
            losses += self._pass(part, loader)
        return losses

    def _example_gradients(self, going: Sequence[int], parts: Sequence[Pass], loader: Loader) -> Tensor:
        """Every client's clipped examples' gradients, summed up until `_take` asks for them; the mean loss of an example.

        No pass has two rows of one client, so the gradient that a client has after it is one example's.
        """
        losses = torch.zeros(self.packed.count, dtype=torch.float64, device=self.device)
        counts = Counter(p.client for part in parts for p in part.places)
        self.examples.begin(going)
        for part in parts:
            torch.manual_seed(derive(self._seed, self._steps, part.places[0].sequence))     # of the model's own dropout
            self.packed.zero_grad()
            losses += self._pass(part, loader).nan_to_num(0.0, 0.0, 0.0)
            for p in part.places:
                self.packed.take_gradients(p.client)
                self.examples.add(p.client)
        return losses / sent_to(self.device, torch.tensor([max(1, counts[k]) for k in range(self.packed.count)]))

    def _take(self, k: int) -> None:
        """Gives member k's parameters the gradient of its step."""
        if self.examples:
            self.examples.finish(k)
        else:
            self.packed.take_gradients(k)

    def _pass(self, part: Pass, loader: Loader) -> Tensor:
        """Adds the gradients of Σ share_i ℓ_i over a pass's rows, ℓ_i the sum of a row's terms; that sum by client, in fp64."""
        losses = torch.zeros(self.packed.count, dtype=torch.float64, device=self.device)
        part = loader.to_device(part)
        with contextlib.ExitStack() as held:
            with self.clock("forward"):
                each = self._forward(part, held)
                total = (each * part.share).sum()
            with self.clock("backward"):
                total.backward()
        return losses.index_add_(0, part.whose, each.detach() * part.share)

    def _forward(self, part: Pass, held: contextlib.ExitStack | None = None) -> Tensor:
        """The sum of each row's terms, (rows,). held: where what the backward pass needs is kept until it is done."""
        batch = part.batch
        spans = [0] * self.packed.count
        for place, span in zip(part.places, batch.spans, strict=True):
            spans[place.client] += span
        self.packed.route(spans, self._keys(part) if self.config.lora_dropout else None)
        with contextlib.ExitStack() as own:
            if self.packs:
                (held or own).enter_context(line(self.model, batch.lengths))
            return self.loss(self.model, batch)

    def _keys(self, part: Pass) -> Tensor:
        """Dropout's key of every place in the model: (client, step, row, sequence, position), so packing does not change it."""
        parts = [(self.members[p.client].key, self.members[p.client].taken, p.sequence, i)
                 for p in part.places for i in range(len(p.lengths))]
        key, step, row, sequence = torch.tensor(parts).T
        lengths = torch.tensor(part.batch.lengths)
        which = torch.repeat_interleave(lengths)
        position = torch.arange(len(which)) - (lengths.cumsum(0) - lengths)[which]
        rows = ops.row_keys(ops.row_keys(key, step), row)
        return sent_to(self.device, ops.row_keys(rows[which], sequence[which], position))

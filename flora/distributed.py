"""The processes of one `torchrun`, each with the base on a device of its own: they share out the clients of a round.

Every process trains some of the clients as a cohort of its own, and the updates are exchanged, as bytes of messages.encode, in the
clients' order. A client's training depends on nothing but itself (cohort.py), so who trains where changes a result as much as
company does: by the rounding of sums, and not at all where clients train one at a time.

The processes stay in lockstep by exchanging what each has done, be it an error, before any of them goes on: an error of one is
raised by all. A process that dies closes its connections, which the others see. No pickle: nothing that is received can run code.
"""
import json
import os
import struct
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from flora import errors
from flora.adapter import Adapters
from flora.client import LocalClient, TrainConfig
from flora.data.batches import steps_per_epoch
from flora.errors import ConfigError, RunError
from flora.exchange import Broadcast, Update
from flora.limits import UNLIMITED
from flora.loop import OnStep
from flora.losses import CausalLM
from flora.messages import decode, encode
from flora.sharded import holds_shards
from flora.steps import tokens_a_step

if TYPE_CHECKING:
    from flora.cohort import Cohort

T = TypeVar("T")
CHUNK = 1 << 30                                                 # bytes of one transfer
PATIENCE = timedelta(days=20)                                   # an evaluation of hours is no error; a lost connection is, at once


class LostError(RunError):
    """Another process of the run has ended."""


def framed(fields: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """What JSON can hold, and bytes beside it, in one piece."""
    head = json.dumps({"fields": fields, "sizes": [len(part) for part in parts]}).encode()
    return b"".join((struct.pack("<Q", len(head)), head, *parts))


def unframed(data: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    """What framed was given."""
    at = 8 + struct.unpack("<Q", data[:8])[0]
    head, view, parts = json.loads(data[8:at]), memoryview(data), []
    for size in head["sizes"]:
        parts.append(view[at:at + size])
        at += size
    return head["fields"], parts


def launched() -> int:
    """How many processes torchrun has started, of which this is one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if dist.is_available() and dist.is_torchelastic_launched() else 1


def first() -> bool:
    """Whether this process is the one that leads, prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0 or launched() == 1


class Team:
    """The processes that torchrun has started: `number` is this one's, of `count`. The first call in a process connects it.

    On CUDA each process takes the device of its number on this machine. Raises ConfigError where there are too few.
    """

    def __init__(self, device: str = "auto"):
        self.count, self.number = launched(), int(os.environ.get("RANK", 0))
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            local, have = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= have:
                raise ConfigError(f"expected a process a GPU, {have} here; torchrun has started more. Lower --nproc-per-node.")
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)

    def _from(self, source: int, data: bytes) -> bytes:
        """What the process `source` gives, on all."""
        try:
            size = torch.tensor([len(data)])
            dist.broadcast(size, source, self._group)
            own = self.number == source and len(data)
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if own else torch.empty(int(size), dtype=torch.uint8)
            for part in whole.split(CHUNK) if int(size) else ():
                dist.broadcast(part, source, self._group)
        except RuntimeError as error:
            raise LostError(f"expected all {self.count} processes until the end of the run; one has ended, or its machine is not "
                            f"reached ({str(error).splitlines()[0][:200]}). What it said stands above.") from error
        return data if own else whole.numpy().tobytes()

    def say(self, data: bytes = b"") -> bytes:
        """The data of process 0, on all."""
        return self._from(0, data)

    def gather(self, data: bytes) -> list[bytes]:
        """The data of every process, on all, in their order."""
        return [self._from(k, data) for k in range(self.count)]

    def together(self, work: Callable[[], tuple[T, bytes]]) -> tuple[T, list[bytes]]:
        """Does the work in every process: (what it gives here, the bytes that it gives in each).

        Where it fails in one, all raise: that one its own error, the others the first one's, of the same class if flora has it.
        """
        failed, result, data = None, None, framed({})
        try:
            result, data = work()
            fields, parts = {"error": None}, [data]
        except Exception as error:                              # whatever it is, the others wait for it
            failed, parts = error, []
            ours = isinstance(error, errors.FloraError)
            fields = {"error": [type(error).__name__, str(error) if ours else f"{type(error).__name__}: {error}"]}
            if not ours and self.number:                        # the others see its message, not where it arose
                traceback.print_exc()
        replies = [unframed(reply) for reply in self.gather(framed(fields, parts))]
        if failed is not None:
            raise failed
        for k, (said, _) in enumerate(replies):
            if said["error"]:
                name, message = said["error"]
                kind = getattr(errors, name, RunError)
                raise kind(f"process {k} of {self.count}: {message}")
        return result, [bytes(parts[0]) for _, parts in replies]

    def fail(self, error: Exception) -> None:
        """Takes part in what all do together by an error, which all raise."""
        def work() -> tuple[None, bytes]:
            raise error

        self.together(work)

    def fit(self, cohort: "Cohort", broadcast: Broadcast, views: Sequence[Adapters | None], on_step: OnStep | None) -> list[Update]:
        """Cohort.fit, its clients shared out: every process calls it with the same arguments and gets all updates, in the clients'
        order. views: the frozen ranks of each; on_step: as there."""
        if holds_shards(cohort.model):
            raise ConfigError("expected a base that every process holds whole, to train clients of its own; got a sharded one, "
                              "which all pass through together. Leave cohort.team None: every process then trains all clients.")
        began, everybody = time.perf_counter(), cohort.clients

        def work() -> tuple[list[Update], bytes]:
            own = shares([cost(client, cohort.train_config) for client in everybody], self.count)[self.number]
            cohort.clients = [everybody[i] for i in own]
            try:
                updates = cohort.fit_here(broadcast, [views[i] for i in own], on_step)
            finally:
                cohort.clients = everybody
            return updates, _reply(updates, cohort.failures, cohort.optimizer_states)

        updates, replies = self.together(work)
        found, failures = {update.client: update for update in updates}, dict(cohort.failures)
        for k, reply in enumerate(replies):
            if k != self.number:
                theirs, reasons, states = _read(reply)
                found |= {update.client: update for update in theirs}
                failures |= reasons
                for name, state in states.items():
                    cohort.optimizer_states.setdefault(name, {}).update(state)
                for update in theirs if on_step is not None else ():
                    on_step(update.client, update.metrics["steps"], update.metrics["steps"], update.metrics["last_loss"])
        took = time.perf_counter() - began
        cohort.failures = {client.name: failures[client.name] for client in everybody if client.name in failures}
        cohort.seconds |= {"wait": max(0.0, took - sum(cohort.seconds.values()))}
        cohort.rate = sum(update.metrics["tokens"] for update in found.values()) / max(1e-9, took)
        return [replace(one, metrics={**one.metrics, "tokens_per_second": cohort.rate})
                for client in everybody if (one := found.get(client.name)) is not None]


def cost(client: LocalClient, config: TrainConfig) -> float:
    """About how many tokens a client trains on in a round."""
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    epoch = steps_per_epoch(len(client.rows), size, accumulation)
    steps = client.max_steps or config.max_steps or config.num_train_epochs * epoch
    return steps * tokens_a_step(client.rows, size * accumulation, config.loss or CausalLM())


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Who goes where so that all are done at about the same time: the dearest first, each to whom has least. Order kept."""
    out: list[list[int]] = [[] for _ in range(count)]
    total = [0.0] * count
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = total.index(min(total))
        out[least].append(i)
        total[least] += costs[i]
    return [sorted(some) for some in out]


def _reply(updates: Sequence[Update], failures: Mapping[str, str], states: Mapping[str, Mapping[str, Tensor]] | None) -> bytes:
    """What one process has to tell of its share. Metrics go beside the updates, whose bytes make floats of all."""
    trained = [update.client for update in updates if states is not None and update.client in states]
    fields = {"metrics": [dict(update.metrics) for update in updates], "failures": dict(failures), "states": trained}
    return framed(fields, [*(encode(update, whole=True) for update in updates),
                           *(safetensors.torch.save(dict(states[name])) for name in trained)])


def _read(reply: bytes) -> tuple[list[Update], dict[str, str], dict[str, dict[str, Tensor]]]:
    """(updates, failures, optimizer states by client) of another process."""
    fields, parts = unframed(reply)
    count = len(fields["metrics"])
    updates = [replace(decode(part, limits=UNLIMITED, kind="update"), metrics=metrics)
               for part, metrics in zip(parts[:count], fields["metrics"], strict=True)]
    states = {name: safetensors.torch.load(bytes(part)) for name, part in zip(fields["states"], parts[count:], strict=True)}
    return updates, fields["failures"], states

"""The server's side of a run whose clients answer in bytes, from processes of their own; whatever carries the bytes.

    run = RemoteRun(config)
    run.open(hellos)                    # who the clients are: names, ranks, rows
    while not run.done:
        for name in run.sampled(): ...  # run.message(name) goes down
        run.close(answers, lost)        # what came up, by client, and why others have not answered

It needs neither data nor a model: shapes come from the model's outline. With both it evaluates the global model after a round, and
writes the merged one at the end. A checkpoint is on the disk before a broadcast leaves, so no client is ever ahead of a run that is
resumed.
"""
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from flora.checkpoint import RunFolder
from flora.client import LocalClient
from flora.config import RunConfig
from flora.engines.measure import NOTHING, client_row, server_row
from flora.engines.merge_log import MergeLog
from flora.engines.plan import outline
from flora.engines.prepare import check, new_server, prepare
from flora.environment import environment
from flora.errors import ConfigError, RunError
from flora.files import staged
from flora.formats import save_peft
from flora.group import concatenated
from flora.inbox import Trust
from flora.messages import Limits, Update, encode
from flora.nn import accumulate, residuals, target_shapes, weights
from flora.report import Report
from flora.server import Server, for_client
from flora.snapshot import Carried
from flora.strategies import strategy_named
from flora.tracking import trackers
from flora.versions import bring_to, resume_at, write_into

LOCAL_ONLY = ("groups", "fleet", "optimizer_state", "over_sampling", "late", "communication_budget_mb", "round_deadline",
              "secure_aggregation", "privacy", "profile")
HEADERS = 1 << 24                                               # bytes of a message beside its numbers


@dataclass(frozen=True)
class Hello:
    """Who a client is. place: in the run's order; examples: its training rows; parameters as of LocalClient."""
    name: str
    place: int
    rank: int
    alpha: float
    examples: int = 1


@dataclass(frozen=True)
class Came:
    """What a client answered: the version of its base, its update (None: it is not at the version that was sent), its numbers."""
    have: int
    update: bytes | None
    metrics: Mapping[str, float] = field(default_factory=dict)


class RemoteRun:
    """One run, in config.output_dir. resume: go on after the last whole round. model: the server has data and model too.

    Raises ConfigError for settings that only a run in one process has, RunError for a folder that is in the way.
    """

    def __init__(self, config: RunConfig, resume: bool = False, model: bool = False):
        refuse(config)
        self.config, self.folder = config, RunFolder(config.output_dir, config.overwrite, resume)
        self._resumed = self.folder.load_checkpoint() if resume else None
        base = self._resumed.base if self._resumed else None
        self.job = prepare(config, lambda line: None, base, only=()) if model else None
        self.model = self.job.model if self.job else outline(config)
        self.shapes = target_shapes(self.model, config.target_modules)
        self.number = self._resumed.number if self._resumed else 0
        self.refused: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._messages: dict[tuple[int, int], bytes] = {}
        self._began = 0.0
        self.report: Report | None = None

    @property
    def done(self) -> bool:
        return self.number >= self.config.num_rounds

    @property
    def measured(self) -> bool:
        """Whether this round is evaluated."""
        return (self.number + 1) % self.config.eval_every == 0 or self.number + 1 == self.config.num_rounds

    def open(self, hellos: Sequence[Hello]) -> None:
        """Begins or goes on with these clients. Raises RunError for too few, StrategyError where the strategy cannot have them."""
        if len(hellos) < self.config.min_clients:
            raise RunError(f"expected at least {self.config.min_clients} clients (min_clients); got {len(hellos)}. Start their "
                           "nodes, or give them longer to join.")
        config, resumed = self.config, self._resumed
        ranks = resumed.ranks if resumed else {}
        clients = [LocalClient(h.name, [{}] * h.examples, min(h.rank, ranks.get(h.name, h.rank)), h.alpha)
                   for h in sorted(hellos, key=lambda h: (h.place, h.name))]
        self.server: Server = new_server(config, self.shapes, clients, resumed.broadcast if resumed else None)
        if resumed:
            resumed.remind(self.server)
        self.server.trust = trusted(self.server.trust, clients, self.shapes)
        self.server.discard()
        due = self.server.broadcast
        self.log = MergeLog(self.folder.path / "merges", due.run)
        for before in self.log.read(last=due.version - 1):
            self.server.remember(before)
        self.server.remember(due)
        if resumed and self.job:
            accumulate(self.model, resumed.beside)
            residuals(self.model).update(resumed.residuals)
            resume_at(self.model, due.run, due.version, merged=resumed.base is not None)
        self.folder.begin(yaml.safe_dump(config.model_dump(exclude={"overwrite"}), sort_keys=False), environment(),
                          self.number)
        self.folder.mark("running", self.number)
        self.report = Report(self.folder.path, self.number)
        self.report.tracked = trackers(config.report_to, self.folder.path, self.number, config.model_dump(), self.report.say)
        if not resumed:
            self._checkpoint()
            if self.job:
                self.report.add(server_row(0, self.job, self.server, {}, {}))

    def sampled(self) -> list[str]:
        """The clients of this round; from here on it is timed."""
        self._began, self._sent, self._messages = time.perf_counter(), {}, {}
        return [client.name for client in self.server.sample(self.number)]

    def rank(self, name: str) -> int:
        return next(client.rank for client in self.server.clients if client.name == name)

    def message(self, name: str, have: int | None = None) -> bytes:
        """What a client is sent: the broadcast that is due, and what its base lacks. have: the version that it says it is at (None:
        as this server knows). Raises StrategyError where what it missed is held no more."""
        due, rank = self.server.broadcast, self.rank(name)
        have = self._versions.get(name, 0) if have is None else have
        if (have, rank) not in self._messages:
            held = weights(self.model, list(self.shapes)) if self.job and self.config.merge_into == "base" else None
            sent = self.server.catch_up(have, held) if have != due.version else replace(due, merge=None, base=None)
            self._messages[have, rank] = encode(for_client(sent, rank))
        self._versions[name] = have
        self._sent[name] = self._sent.get(name, 0) + len(self._messages[have, rank])
        return self._messages[have, rank]

    def close(self, answers: Mapping[str, Came], lost: Mapping[str, str]) -> dict[str, Any]:
        """Aggregates a round and gives its row. answers: by client; lost: why others have not answered.

        Raises RunError where too few are left (min_clients); the run can be resumed at this round then.
        """
        server, config, number = self.server, self.config, self.number
        seconds = {"clients": time.perf_counter() - self._began}
        began = time.perf_counter()
        arrived = {c.name: answers[c.name] for c in server.clients
                   if c.name in answers and answers[c.name].update is not None}
        self._versions |= {name: max(0, min(came.have, server.broadcast.version)) for name, came in answers.items()}
        left_out = {**lost, **{name: f"its base is at version {came.have} still" for name, came in answers.items()
                               if came.update is None}}
        left_out |= server.take({name: came.update for name, came in arrived.items()})
        updates = list(server.received)
        short = server.short()
        if not short:
            dense = weights(self.model, list(self.shapes)) if self.job and config.downlink in ("dense", "auto") else None
            server.close((), dense)
            left_out |= server.sifted.left_out
        self.refused = left_out
        self._rows(number, updates, arrived)
        for name, reason in left_out.items():
            self.report.add({"kind": "failure", "round": number, "client": name, "reason": reason})
        if short:
            self.folder.mark("failed", number)
            raise RunError(f"round {number}: {short}. {_said(left_out)} Go on from the checkpoint in {self.folder.path} (resume).")
        seconds["aggregate"] = time.perf_counter() - began
        return self._closed(updates, {name: len(came.update) for name, came in arrived.items()}, seconds)

    def _rows(self, number: int, updates: Sequence[Update], arrived: Mapping[str, Came]) -> None:
        """A row of every client whose update counts."""
        parties = {client.name: client for client in self.server.clients}
        for update in updates:
            came = arrived[update.client]
            clock = {"seconds": came.metrics.get("seconds", 0.0), "tokens_per_second": came.metrics.get("tokens_per_second", 0.0)}
            defaults = {"steps": 0, "tokens": 0, "loss": None}
            told = replace(update, metrics={**defaults, **update.metrics, **clock})
            found = [NOTHING | {name.removeprefix("eval_").removesuffix(when): value for name, value in came.metrics.items()
                                if name.startswith("eval_") and name.endswith(when)} for when in ("_before", "_after")]
            row = client_row(number, parties[update.client], told, *found)
            self.report.add(row | {"bytes_up": len(came.update), "bytes_down": self._sent.get(update.client, 0)})

    def _closed(self, updates: Sequence[Update], up: Mapping[str, int], seconds: dict[str, float]) -> dict[str, Any]:
        """Writes a round that was aggregated; its row."""
        server, config, number = self.server, self.config, self.number
        measured = self.measured
        server.shrink(updates)
        self.log.add(server.broadcast)
        began = time.perf_counter()
        self.folder.save_round(number, updates, server.broadcast, config.keep_rounds, config.model_name_or_path)
        seconds["save"] = time.perf_counter() - began
        row: dict[str, Any] = {"kind": "server", "rounds_done": number + 1, "seconds": seconds}
        if self.job and measured:
            row = server_row(number + 1, self.job, server, {}, seconds)
        elif self.job:
            bring_to(self.model, server.broadcast, self.job.merge_config)
        row |= {"bytes_up": sum(up.values()), "bytes_down": sum(self._sent.values()), "clients": len(updates)}
        self.report.add(row)
        self.number += 1
        self._checkpoint()
        self.folder.mark("running", self.number)
        return row

    def _checkpoint(self) -> None:
        if self.config.checkpoint_every:
            self.folder.save_checkpoint(self.model, self.number, self.server, Carried())

    def finish(self) -> Path | None:
        """Ends the run and gives where its result lies: the merged model, where the server has one; else the sum of all updates, an
        adapter for the untouched base, where no layer went as weights. None where there is none, or save_model is off."""
        due, where = self.server.broadcast, None
        if self.job and due.start is not None:
            write_into(self.model, due.start, self.job.merge_config, self.job.merge_config.seed_of(due.version))
        if self.config.save_model and self.job:
            where = self.folder.save_model(self.model, self.job.tokenizer, self.config.model_name_or_path)
        elif self.config.save_model:
            changes = list(self.log.read(last=due.version))
            parts = [b.merge for b in changes if b.merge] + [part for part in (due.start,) if part]
            if parts and not any(b.base for b in changes):
                with staged(self.folder.path / "adapter") as folder:
                    save_peft(concatenated(parts), folder, self.config.model_name_or_path)
                where = self.folder.path / "adapter"
        self.folder.mark("finished", self.number)
        self.leave()
        return where

    def leave(self) -> None:
        """Lets go of the folder, so that another process, or a run in this one, may go on with it. Twice does no harm."""
        if self.report is not None:
            self.report.tracked.close(failed=not self.done)
        self.folder.__exit__()


def refuse(config: RunConfig) -> None:
    """Raises ConfigError for what only a run in one process has, and for what `check` refuses."""
    check(config)
    fields = type(config).model_fields
    given = [key for key in LOCAL_ONLY if getattr(config, key) != fields[key].default]
    rule = strategy_named(config.strategy)
    if given or rule.pooled or rule.home:
        what = given[0] if given else f"strategy {config.strategy}"
        raise ConfigError(f"{what}: expected a setting that clients in processes of their own can have; got one of a run in one "
                          "process. Leave it out, or take `flora run`.")
    if config.checkpoint_every > 1:
        raise ConfigError(f"checkpoint_every: expected 1 (or 0: no resume), so that no client is ahead of a run that is resumed; "
                          f"got {config.checkpoint_every}. Leave it out.")


def trusted(trust: Trust, clients: Sequence[LocalClient], shapes: Mapping[str, tuple[int, int]]) -> Trust:
    """This trust, with limits: no message larger than an update of the largest rank, or of whole weights, in fp32."""
    rank = max(client.rank for client in clients)
    numbers = sum(max(rank * (out + inn + 1), out * inn) for out, inn in shapes.values())
    return replace(trust, limits=trust.limits or Limits(max_bytes=4 * numbers + HEADERS, max_header_bytes=HEADERS, max_rank=rank))


def _said(reasons: Mapping[str, str]) -> str:
    return " ".join(f"{name}: {reason}" + ("" if reason.endswith(".") else ".") for name, reason in reasons.items())

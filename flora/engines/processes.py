"""A run under torchrun: process 0 leads it as one process would; the others hold the base, and train what they are told to.

What the leader says is one frame before each thing that all do together: "begin" (load the model and the rows, from the checkpoint
where there is one), "fit" (a round, or an inner one: its broadcast, and what is each client's own), "end". So every decision is the
leader's alone, and no clock, draw or evaluation has to come out the same twice.
"""
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flora.adapter import Adapters
from flora.budget import Budget
from flora.checkpoint import RunFolder
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.config import RunConfig
from flora.distributed import LostError, Team, first, framed, launched, unframed
from flora.engines.prepare import Job, prepare
from flora.errors import ConfigError
from flora.limits import UNLIMITED
from flora.loop import OnStep
from flora.messages import Broadcast, Update, decode, encode
from flora.nn import accumulate, residuals
from flora.snapshot import Resumed
from flora.versions import resume_at

log = logging.getLogger(__name__)
OWN = ("name", "rank", "alpha", "learning_rate", "max_steps", "layers")      # of a client, beside its rows and adapters


class Leader(Team):
    """Process 0's Team: it says what is to be done, and does its own share."""

    def begin(self) -> None:
        """Lets the others load what they need. Raises what hindered one of them."""
        self.say(framed({"what": "begin"}))
        self.together(lambda: (None, b""))

    def fit(self, cohort: Cohort, broadcast: Broadcast, views: Sequence[Adapters | None], on_step: OnStep | None) -> list[Update]:
        self.say(_order(cohort, broadcast, views))
        return super().fit(cohort, broadcast, views, on_step)


@contextlib.contextmanager
def several(config: RunConfig) -> Iterator[Team | None]:
    """The processes of one torchrun while a run goes on, a Leader in process 0; None where this process is alone.

    An error of the leader ends the others too. Raises ConfigError for a device that all would share.
    """
    if launched() == 1:
        yield None
        return
    if config.device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device: expected auto, cuda or cpu for several processes, which take a device each; got "
                          f"{config.device!r}. Leave it out.")
    team = (Leader if first() else Team)(config.device)
    try:
        yield team
    except Exception as error:
        if first() and not isinstance(error, LostError):
            team.say(framed({"what": "end"}))
        raise
    if first():
        team.say(framed({"what": "end"}))


def put_back(job: Job, resumed: Resumed | None) -> None:
    """Brings a model that was loaded from a checkpoint's base to its version, with what its merges left."""
    if resumed:
        accumulate(job.model, resumed.beside)
        residuals(job.model).update(resumed.residuals)
        resume_at(job.model, resumed.broadcast.run, resumed.broadcast.version, resumed.base is not None, resumed.merge_errors)


@dataclass
class _Hand:
    """What a process that follows holds."""
    job: Job
    budget: Budget
    optimizers: dict[str, dict[str, Any]] | None


def follow(config: RunConfig, team: Team, resume: bool) -> Path:
    """Trains this process's share of every round, until the leader ends the run; returns the run's folder. Prints nothing: the
    leader says what goes wrong here."""
    hand: _Hand | None = None
    while True:
        said, parts = unframed(team.say())
        try:
            if said["what"] == "end":
                return Path(config.output_dir).expanduser()
            if said["what"] == "begin":
                hand, _ = team.together(lambda: (_begin(config, resume), b""))
            else:
                _fit(team, hand, said, parts)
        except LostError:
            raise
        except Exception as error:                              # all have it, and the leader ends the run
            log.debug("process %d: %s", team.number, error)


def _begin(config: RunConfig, resume: bool) -> _Hand:
    """The model and the clients' rows, as the leader has them."""
    resumed = RunFolder(config.output_dir, resume=True).load_checkpoint() if resume else None
    job = prepare(config, lambda line: None, resumed.base if resumed else None)
    put_back(job, resumed)
    kept = (resumed.optimizers if resumed else None) or {}
    return _Hand(job, Budget(job.model, config.max_tokens_per_batch, resumed.budget if resumed else None),
                 kept if config.optimizer_state == "keep" else None)


def _order(cohort: Cohort, broadcast: Broadcast, views: Sequence[Adapters | None]) -> bytes:
    """All that a cohort's next fit depends on and that a follower cannot know: each set of adapters once."""
    if cohort.train_config.loss is not None:
        raise ConfigError("loss: expected the loss of a causal LM, which every process has; got another. Train in one process.")
    parts, places = [encode(broadcast, whole=True)], {}

    def place(adapters: Adapters | None) -> int | None:
        if adapters is None:
            return None
        if id(adapters) not in places:
            places[id(adapters)] = len(parts)
            parts.append(encode(Update(adapters, 1), whole=True))
        return places[id(adapters)]

    train = {f.name: getattr(cohort.train_config, f.name) for f in fields(TrainConfig) if f.name != "loss"}
    train["example_key"] = train["example_key"] and train["example_key"].hex()
    clients = [{**{name: getattr(client, name) for name in OWN}, "layers": client.layers and [*client.layers],
                "start": place(client.start), "view": place(view)} for client, view in zip(cohort.clients, views, strict=True)]
    return framed({"what": "fit", "targets": cohort.targets, "train": train, "clients": clients}, parts)


def _fit(team: Team, hand: _Hand, said: Mapping[str, Any], parts: Sequence[bytes]) -> None:
    """This process's share of a cohort's fit, as the leader has told it."""
    try:
        cohort, broadcast, views = _told(hand, said, parts)
    except Exception as error:
        team.fail(error)
    else:
        team.fit(cohort, broadcast, views, None)


def _told(hand: _Hand, said: Mapping[str, Any], parts: Sequence[bytes]) -> tuple[Cohort, Broadcast, list[Adapters | None]]:
    """The cohort of an order, its broadcast and its clients' frozen ranks."""
    broadcast, *sets = [decode(part, limits=UNLIMITED) for part in parts]
    rows = {client.name: client.rows for client in hand.job.clients}
    clients, views = [], []
    for told in said["clients"]:
        start, view = (None if told[key] is None else sets[told[key] - 1].adapters for key in ("start", "view"))
        clients.append(LocalClient(rows=rows[told["name"]], start=start, **{name: told[name] for name in OWN}))
        views.append(view)
    key = said["train"]["example_key"]
    train = replace(hand.job.train_config, **{**said["train"], "example_key": key and bytes.fromhex(key)})
    job = hand.job
    return Cohort(job.model, clients, train, said["targets"], hand.budget, job.merge_config, hand.optimizers), broadcast, views

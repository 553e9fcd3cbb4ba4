"""A client in a process of its own: a base model, its own rows, and one answer to every message, in bytes.

Its process may end between two rounds, and then its model is the original one again. So what a message changed is kept on the disk
(merge_log.py) and replayed when the process starts; a client whose log is gone too, or that sat out some rounds, says which version
it is at in place of an update, and is sent what it missed. Versions are counted by run, so nothing is merged twice.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flora.cohort import Cohort
from flora.config import RunConfig
from flora.engines.merge_log import MergeLog
from flora.engines.prepare import Job, base_model, merge_config, prepare, sent_up
from flora.errors import MessageError, RunError, TrainingError
from flora.evaluate import evaluate_clients
from flora.messages import Broadcast, Limits, decode, encode
from flora.nn import target_shapes
from flora.strategies import strategy_named
from flora.versions import bring_to, version_of


@dataclass(frozen=True)
class Own:
    """What a client says for itself, where the run's config does not: rank, alpha, the file of its rows (all of them its own), its
    name."""
    rank: int | None = None
    alpha: float | None = None
    dataset: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Answer:
    """have: the version that the base is at now; update: what was trained, encoded; None where the base could not be brought to the
    version that was sent. metrics: numbers for the report, the clock among them."""
    have: int
    update: bytes | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Base:
    """The base model of a process, shared by all clients that live in it, and the version that it is at.

    config: the model, and how merges reach it; folder: of the logs. Where a run ends and another begins, the original is loaded
    again.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self._config, self.folder = config, folder
        self.how = merge_config(config)
        self.model, self.run = base_model(config), ""

    def at(self, run: str) -> int:
        """The version of the base in this run, after what the disk knows of it was replayed."""
        if run != self.run:
            self._restart(run)
        return version_of(self.model, run)

    def reach(self, sent: Broadcast, needed: int) -> bool:
        """Brings the base to what was sent; False where it is at another version than that adds to. needed: the last version that
        changed the base, up to sent's own: where nothing is sent to merge, the base must be there already."""
        have = self.at(sent.run)
        if have > sent.version:                                 # of a server that went back to an older checkpoint
            self._restart(sent.run, forget=True)
            have = 0
        since = sent.version - 1 if sent.since is None else sent.since
        news = sent.merge is not None or sent.base is not None
        if have < needed if not news else have != sent.version and sent.base is None and have != since:
            return False
        if have < sent.version:
            MergeLog(self.folder, sent.run).add(sent)
        bring_to(self.model, sent, self.how)
        return True

    def _restart(self, run: str, forget: bool = False) -> None:
        """The original model, and what the disk knows of this run, or nothing of it."""
        log = MergeLog(self.folder, run)
        if forget:
            log.clear()
        log.clear_old()
        if self.model.__dict__.pop("_flora_versions", None):
            self.model = base_model(self._config)
        self.run = run
        for change in log.read():
            try:
                bring_to(self.model, change, self.how)
            except RunError:                                    # a file between is missing: on from here, the server has the rest
                return


class Party:
    """A client of a run: its rows, as the run deals them or its own, and a base.

    place: which client of the config it is (from 0). Raises what `prepare` raises.
    """

    def __init__(self, config: RunConfig, place: int, base: Base, own: Own | None = None):
        own = own or Own()
        self.config, self.base = _alone(config, place, own) if own.dataset else config, base
        self.job: Job = prepare(self.config, lambda line: None, self.base.model, {0 if own.dataset else place})
        client = self.job.clients[0]
        rank = own.rank or client.rank
        alpha = own.alpha or client.alpha / client.rank * rank
        self._rows_of = client.name
        default = f"client-{place}" if own.dataset else client.name
        self.client = replace(client, name=own.name or default, rank=rank, alpha=alpha)
        self.shapes = target_shapes(self.base.model, config.target_modules)
        self.home = strategy_named(config.strategy).home

    def answer(self, message: bytes, needed: int, rank: int, measured: bool = False) -> Answer:
        """Trains on a broadcast (the message), and gives the update; needed: the version that its base must be at. rank: what the
        server has noted for this client; measured: evaluate on its own held-out rows before and after.

        Raises MessageError for bytes that are no broadcast for this model, TrainingError where it has no update.
        """
        sent = decode(message, self.shapes, Limits(max_bytes=max(1 << 34, 8 * len(message))))
        if not isinstance(sent, Broadcast):
            raise MessageError("expected a broadcast; got an update, which only a client sends. The message is refused.")
        if not self.base.reach(sent, needed):
            return Answer(self.base.at(sent.run))
        model, client = self.base.model, replace(self.client, rank=rank)
        metrics = self._measured(sent.start, "before") if measured else {}
        cohort = Cohort(model, [client], self.job.train_config, self.config.target_modules, self.config.max_tokens_per_batch,
                        self.base.how)
        updates = cohort.fit(sent)
        if not updates:
            raise TrainingError(cohort.failures[client.name])
        update = updates[0]
        metrics |= self._measured({**(sent.start or {}), **update.adapters}, "after") if measured and update.base is None else {}
        metrics |= {name: update.metrics[name] for name in ("seconds", "tokens_per_second")}
        return Answer(version_of(model, sent.run), encode(sent_up(update, self.home), given=sent), metrics)

    def _measured(self, view: Mapping | None, when: str) -> dict[str, float]:
        """Loss and accuracy of this view on its own held-out rows, under the names of the report."""
        rows, key = self.job.eval_rows[self._rows_of], self._rows_of
        found = evaluate_clients(self.base.model, {key: view}, {key: rows}, self.job.eval_batch_size,
                                 self.job.train_config.pad_token_id)[key]
        scores = self.job.scores.of_clients(self.base.model, {key: view})[key]
        both = {**(found or {}), **scores}
        return {f"eval_{name}_{when}": value for name, value in both.items()
                if value is not None and name not in ("seconds", "perplexity", "tokens")}


def _alone(config: RunConfig, place: int, own: Own) -> RunConfig:
    """The config of a client whose rows are a file of its own; one row is set aside, as a run has one for its server."""
    return RunConfig(**{**config.model_dump(), "dataset": own.dataset, "num_clients": 1, "partition": {}, "fraction_train": 1.0,
                        "server_eval_rows": 1, "lora_r": config.ranks()[place % config.num_clients],
                        "lora_alpha": config.alphas()[place % config.num_clients], "min_clients": 1, "robust": None})

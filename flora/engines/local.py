"""A whole federated run in one process: the loop that DESIGN calls the one a newcomer looks for."""
import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from flora.adapter import Adapters, truncate
from flora.allocator import keep_large_blocks
from flora.checkpoint import Resumed, RunFolder
from flora.client import LocalClient
from flora.cohort import Cohort
from flora.config import RunConfig, load, parse
from flora.engines.prepare import Job, environment, prepare
from flora.errors import ConfigError
from flora.evaluate import evaluate, evaluate_clients
from flora.messages import Broadcast, Update, encode
from flora.nn import accumulate, applied, residuals, target_shapes
from flora.report import Report
from flora.server import Server
from flora.strategies import come_home, leave_home, strategy_named
from flora.versions import bring_to, resume_at, write_into


def run(config: RunConfig | Mapping[str, Any] | str | Path, resume: bool = False) -> Path:
    """Runs a federated fine-tuning and returns its folder.

    config: a RunConfig, its keys and values, or the path of a YAML file. resume: go on after the last whole round of the run
    in output_dir. Ctrl-C leaves a readable folder. Raises ConfigError, DataError, FetchError, RunError, StrategyError.
    """
    if not isinstance(config, RunConfig):
        config = parse(config) if isinstance(config, Mapping) else parse(load(config), str(config))
    trains = strategy_named(config.strategy).begin({}, [1], 0).train
    if trains not in ("AB", "A", "B"):
        raise ConfigError(f"strategy {config.strategy}: expected one whose clients train A or B; it trains the {trains}, which "
                          "flora.aggregate combines and a run cannot train yet. Use another strategy.")
    folder = RunFolder(config.output_dir, config.overwrite, resume)
    keep_large_blocks()
    console = Console(stderr=True, quiet=config.quiet)
    resumed = folder.load_checkpoint() if resume else None
    job = prepare(config, lambda line: console.print(line, highlight=False, soft_wrap=True), resumed.base if resumed else None)
    folder.begin(yaml.safe_dump(config.model_dump(exclude={"overwrite"}), sort_keys=False), environment())
    folder.mark("running", resumed.number if resumed else 0)
    try:
        _run(config, folder, job, resumed)
    except KeyboardInterrupt:
        folder.mark("interrupted", folder.state().get("rounds_done", 0))
        raise
    except BaseException:
        with contextlib.suppress(Exception):                    # the disk may be full; the first error is the one to show
            folder.mark("failed", folder.state().get("rounds_done", 0))
        raise
    return folder.path


def _run(config: RunConfig, folder: RunFolder, job: Job, resumed: Resumed | None) -> None:
    """The run itself, in a folder that is open."""
    if resumed:
        accumulate(job.model, resumed.beside)
        residuals(job.model).update(resumed.residuals)
        resume_at(job.model, resumed.broadcast.run, resumed.broadcast.version, merged=resumed.base is not None)
    with Report(folder.path, config.num_rounds, resumed.number if resumed else 0, config.quiet) as report:
        report.say(f"{len(job.clients)} clients, strategy {config.strategy}, {config.num_rounds} rounds")
        broadcast = resumed.broadcast if resumed else first_broadcast(config, job)
        server = Server(config.strategy, job.clients, broadcast, config.fraction_train, config.weighting, config.seed)
        home = dict(resumed.home) if resumed else {}
        if report.first == 0:
            start = download_size(server) * len(server.clients)
            report.add(server_row(0, job, server, home, {}) | {"bytes_down": start})
        rounds(config, job, server, report, folder, home)
        if server.broadcast.start is not None:
            seed = job.merge_config.seed_of(server.broadcast.version)
            write_into(job.model, server.broadcast.start, job.merge_config, seed)    # last: nothing trains on this model any more
        saved = folder.save_model(job.model, job.tokenizer, config.model_name_or_path)
        folder.mark("finished", config.num_rounds)
    console = Console()
    for table in report.table():
        console.print(table)
    what = "the merged model" if saved.name == "model" else "the sum of all updates, an adapter for the untouched base,"
    what = "the clients' models stay theirs (rounds/); the untouched base" if server.strategy.home else what
    console.print(f"{what} is in {saved}, every row in {folder.path / 'metrics.jsonl'}", highlight=False,
                  soft_wrap=True)


def rounds(config: RunConfig, job: Job, server: Server, report: Report, folder: RunFolder,
           home: dict[str, Adapters]) -> None:
    """The federated loop."""
    for number in range(report.first, config.num_rounds):
        sent, own = server.broadcast, views_at_home(server, home)
        clients = [replace(client, start=own.get(client.name)) for client in server.sample(number)]
        bring_to(job.model, sent, job.merge_config)
        before = evaluated(job, {c.name: _before(c, sent) for c in clients}, report, f"round {number}: before")
        cohort = Cohort(job.model, clients, job.train_config, config.target_modules, config.max_tokens_per_batch, job.merge_config)
        report.start(f"round {number}: train", len(clients))
        updates = cohort.fit(sent, on_step=lambda *step, cohort=cohort: report.on_step(*step, cohort.tokens_per_second))
        views = {u.client: {**(sent.start or {}), **u.adapters} for u in updates}
        after = evaluated(job, views, report, f"round {number}: after")
        home.update({u.client: u.adapters for u in updates} if server.strategy.home else {})

        began = time.perf_counter()
        server.close([replace(u, adapters=leave_home(u.adapters, server.strategy.home)) for u in updates])
        seconds = cohort.seconds | {"aggregate": time.perf_counter() - began}
        seconds["evaluate"] = sum(found["seconds"] for found in (*before.values(), *after.values()))

        size = download_size(server)
        up = 0
        for client, update in ((c, u) for c in clients for u in updates if u.client == c.name):
            row = client_row(number, client, update, before[client.name], after[client.name])
            row |= {"bytes_up": upload_size(server, update), "bytes_down": size}
            up += row["bytes_up"]
            report.add(row)
        for name, reason in cohort.failures.items():
            report.add({"kind": "failure", "round": number, "client": name, "reason": reason})
            report.say(f"round {number}: {name} is left out: {reason}")
        began = time.perf_counter()
        folder.save_round(number, updates, server.broadcast, config.keep_rounds, config.model_name_or_path)
        seconds["save"] = time.perf_counter() - began
        row = server_row(number + 1, job, server, home, seconds) | {"bytes_up": up, "bytes_down": size * len(server.clients),
                                                                    "tokens_per_second": cohort.rate}
        report.add(row)
        folder.save_checkpoint(job.model, number + 1, server.broadcast, home)
        folder.mark("running", number + 1)
        report.say(f"round {number}: held-out loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:.1%}")
        report.round_done()


def views_at_home(server: Server, home: Mapping[str, Adapters]) -> dict[str, Adapters]:
    """The models of clients that keep factors at home: what the server sends next, with their own in their places."""
    kept, start = server.strategy.home, server.broadcast.start
    return {name: held if start is None else come_home(start, held, kept) for name, held in home.items()}


def first_broadcast(config: RunConfig, job: Job) -> Broadcast:
    """Strategy.begin for this run's layers and ranks, under a name of the run's own, so merges are counted per run."""
    shapes = target_shapes(job.model, config.target_modules)
    ranks = [client.rank for client in job.clients]
    scale = sum(client.alpha / client.rank for client in job.clients) / len(job.clients)
    broadcast = strategy_named(config.strategy).begin(shapes, ranks, config.seed, scale)
    return replace(broadcast, run=secrets.token_hex(8))


@contextlib.contextmanager
def _with_adapters(job: Job, adapters: Adapters | None) -> Iterator[None]:
    """The model with these adapters on top, or as it is."""
    with applied(job.model, adapters) if adapters else contextlib.nullcontext():
        yield


def _silent(server: Server) -> bool:
    """Nothing travels where everything stays at home, or where there is one party."""
    return server.strategy.home == "AB" or server.strategy.pooled


def upload_size(server: Server, update: Update) -> int:
    """Bytes of a client's update as it travels."""
    return 0 if _silent(server) else len(encode(update))


def download_size(server: Server) -> int:
    """Bytes of the broadcast that is due, as it travels to each client, sampled or not: all must follow the base."""
    return 0 if _silent(server) else len(encode(server.broadcast))


def evaluated(job: Job, views: Mapping[str, Adapters | None], report: Report, what: str) -> dict[str, dict[str, Any]]:
    """Each client's view of the model (the base and these adapters) on its own held-out rows, all in one batch; None where it has
    none. seconds: each one's share of the whole, by its rows."""
    rows = {name: job.eval_rows[name] for name in views}
    count = sum(map(len, rows.values()))
    report.start(what, count)
    began = time.perf_counter()
    found = evaluate_clients(job.model, views, rows, job.eval_batch_size, job.train_config.pad_token_id, report.advance)
    took = time.perf_counter() - began
    nothing = {"loss": None, "accuracy": None}
    return {name: (metrics or nothing) | {"seconds": took * len(rows[name]) / max(1, count)} for name, metrics in found.items()}


def _before(client: LocalClient, broadcast: Broadcast) -> Adapters | None:
    """What a client starts from, as it sees it: cut to its rank. Fresh ranks add nothing yet."""
    held = client.start if client.start is not None else broadcast.start
    return held and {name: truncate(adapter, client.rank) for name, adapter in held.items()}


def client_row(number: int, client: LocalClient, update: Update, before: Mapping[str, Any],
               after: Mapping[str, Any]) -> dict[str, Any]:
    """A client's row of metrics.jsonl. loss: mean training loss over the round's steps; seconds by phase."""
    metrics = update.metrics
    return {"kind": "client", "round": number, "client": client.name, "rank": client.rank, "alpha": client.alpha,
            "num_examples": update.num_examples, "steps": metrics["steps"], "loss": metrics["loss"],
            "eval_loss_before": before["loss"], "eval_loss_after": after["loss"],
            "eval_accuracy_before": before["accuracy"], "eval_accuracy_after": after["accuracy"],
            "tokens_per_second": metrics["tokens_per_second"],
            "seconds": {"train": metrics["seconds"], "evaluate": before["seconds"] + after["seconds"]}}


def server_row(rounds_done: int, job: Job, server: Server, home: Mapping[str, Adapters],
               seconds: Mapping[str, float]) -> dict[str, Any]:
    """Merges what is due and evaluates the global model: base and start; without a server, the mean of the clients' own models."""
    began = time.perf_counter()
    bring_to(job.model, server.broadcast, job.merge_config)
    merged = time.perf_counter()
    views = list(views_at_home(server, home).values()) if server.strategy.home else [server.broadcast.start]
    results = []
    for adapters in views or [None]:
        with _with_adapters(job, adapters):
            results.append(evaluate(job.model, job.server_rows, job.eval_batch_size, job.train_config.pad_token_id))
    mean = {name: sum(r[name] for r in results) / len(results) for name in ("loss", "perplexity", "accuracy")}
    row = {"kind": "server", "rounds_done": rounds_done, "eval_loss": mean["loss"], "eval_perplexity": mean["perplexity"],
            "eval_accuracy": mean["accuracy"], "bytes_up": 0, "bytes_down": 0,
            "seconds": {**seconds, "merge": seconds.get("merge", 0.0) + merged - began,
                        "evaluate": seconds.get("evaluate", 0.0) + time.perf_counter() - merged}}
    errors = job.model.__dict__.get("_flora_merge_errors")
    return row if errors is None else row | {"merge_error": max(errors.values(), default=0.0)}


def resume(folder: str | Path) -> Path:
    """Goes on with an unfinished run after its last whole round, with its own config. Raises RunError where there is none."""
    settings = load(Path(folder) / "config.yaml")
    if not settings:
        raise ConfigError(f"expected the resolved config of a run in {folder}; got an empty config.yaml")
    return run(parse({**settings, "output_dir": str(folder)}), resume=True)

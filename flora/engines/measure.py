"""What a round is measured by: every client's view of the model before and after, and the global model."""
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flora.adapter import Adapters, truncate
from flora.client import LocalClient
from flora.engines.prepare import Job
from flora.evaluate import evaluate, evaluate_clients
from flora.group import Group, leaves
from flora.messages import Broadcast, Update
from flora.nn import applied, load_weights, weights
from flora.report import Report
from flora.server import Server
from flora.strategies import come_home
from flora.versions import bring_to, merge_errors

NOTHING = {"loss": None, "accuracy": None, "seconds": 0.0}


def views_at_home(server: Server, home: Mapping[str, Adapters]) -> dict[str, Adapters]:
    """The models of clients that keep factors at home: what the server sends next, with their own in their places."""
    kept, start = server.strategy.home, server.broadcast.start
    return {name: held if start is None else come_home(start, held, kept) for name, held in home.items()}


def before(job: Job, clients: list[LocalClient], sent: Broadcast, report: Report, number: int) -> dict[str, dict[str, Any]]:
    """Each client's own rows under what it starts from."""
    views = {client.name: _start(client, sent) for client in clients}
    return _evaluated(job, views, report, f"round {number}: before")


def after(job: Job, updates: list[Update], sent: Broadcast, report: Report, number: int,
          parties: Sequence[LocalClient | Group] = ()) -> dict[str, dict[str, Any]]:
    """Each client's own rows under what it trained; under its group's answer, where it is in one of these."""
    what = f"round {number}: after"
    if not any(update.base for update in updates):
        of = {party.name: leaves([party]) for party in parties}
        views = {name: {**(sent.start or {}), **u.adapters} for u in updates
                 for name in ([client.name for client in of[u.client]] if u.client in of else [u.client])}
        return _evaluated(job, views, report, what)
    found = {}
    for update in updates:                                      # whole weights: one client at a time
        held = {name: w.clone() for name, w in weights(job.model, list(update.base)).items()}
        try:
            load_weights(job.model, update.base)
            found |= _evaluated(job, {update.client: None}, report, what)
        finally:
            load_weights(job.model, held)
    return found


def _start(client: LocalClient, broadcast: Broadcast) -> Adapters | None:
    """What a client starts from, as it sees it: cut to its rank. Fresh ranks add nothing yet."""
    held = client.start if client.start is not None else broadcast.start
    return held and {name: truncate(adapter, client.rank) for name, adapter in held.items()}


def _evaluated(job: Job, views: Mapping[str, Adapters | None], report: Report, what: str) -> dict[str, dict[str, Any]]:
    """Each client's view of the model (the base and these adapters) on its own held-out rows, all in one batch; None where it has
    none. seconds: each one's share of the whole, by its rows."""
    rows = {name: job.eval_rows[name] for name in views}
    count = sum(map(len, rows.values()))
    report.start(what, count)
    began = time.perf_counter()
    found = evaluate_clients(job.model, views, rows, job.eval_batch_size, job.train_config.pad_token_id, report.advance)
    more = job.scores.of_clients(job.model, views)
    took = time.perf_counter() - began
    return {name: NOTHING | (metrics or {}) | more.get(name, {}) | {"seconds": took * len(rows[name]) / max(1, count)}
            for name, metrics in found.items()}


def over_group(found: Mapping[str, Mapping[str, Any]], group: Group, job: Job) -> dict[str, Any]:
    """A group's clients as one: means by their held-out rows; seconds: the sum."""
    mine = [(found[client.name], len(job.eval_rows[client.name])) for client in group.clients if client.name in found]
    out = {"seconds": sum(one["seconds"] for one, _ in mine)}
    for name in {key for one, _ in mine for key in one} - {"seconds", "perplexity", "tokens"}:
        known = [(one[name], rows) for one, rows in mine if one.get(name) is not None and rows]
        out[name] = sum(value * rows for value, rows in known) / sum(rows for _, rows in known) if known else None
    return NOTHING | out


def client_row(number: int, client: LocalClient | Group, update: Update, before: Mapping[str, Any],
               after: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a client, or of a group that answers as one. loss: mean training loss over the round's steps; seconds by phase."""
    metrics, own = update.metrics, leaves([client])
    group = {"members": len(own), "inner_rounds": client.inner_rounds, "depth": client.depth} if isinstance(client, Group) else {}
    if "compress_error" in metrics:
        group["compress_error"] = metrics["compress_error"]
    row = {"kind": "client", "round": number, "client": client.name, "rank": max(c.rank for c in own),
           "alpha": max(c.alpha for c in own), **group,
           "num_examples": update.num_examples, "steps": metrics["steps"], "tokens": metrics["tokens"], "loss": metrics["loss"]}
    for name in sorted({*before, *after} - {"seconds", "perplexity", "tokens"}):
        row |= {f"eval_{name}_before": before.get(name), f"eval_{name}_after": after.get(name)}
    return row | {"ranks": sum(a.rank for a in update.adapters.values()), "tokens_per_second": metrics["tokens_per_second"],
                  "seconds": {"train": metrics["seconds"], "evaluate": before["seconds"] + after["seconds"]}}


@contextlib.contextmanager
def _with_adapters(job: Job, adapters: Adapters | None) -> Iterator[None]:
    """The model with these adapters on top, or as it is."""
    with applied(job.model, adapters) if adapters else contextlib.nullcontext():
        yield


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
            found = evaluate(job.model, job.server_rows, job.eval_batch_size, job.train_config.pad_token_id)
            results.append(found | job.scores.of_server(job.model))
    mean = {f"eval_{name}": sum(r[name] for r in results) / len(results) for name in results[0] if name != "tokens"}
    row = {"kind": "server", "rounds_done": rounds_done, **mean, "bytes_up": 0, "bytes_down": 0,
           "seconds": {**seconds, "merge": seconds.get("merge", 0.0) + merged - began,
                       "evaluate": seconds.get("evaluate", 0.0) + time.perf_counter() - merged}}
    return row | _losses(job, server)


def _losses(job: Job, server: Server) -> dict[str, float]:
    """What the downlink and a compressed adapter beside the base left out."""
    errors = merge_errors(job.model)
    return ({} if server.downlink.how == "stack" else {"downlink_error": server.downlink_error}) | (
        {} if errors is None else {"merge_error": max(errors.values(), default=0.0)})


def unmeasured_row(rounds_done: int, job: Job, server: Server, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Merges what is due; the row of a round after which nothing is evaluated (eval_every)."""
    began = time.perf_counter()
    bring_to(job.model, server.broadcast, job.merge_config)
    return {"kind": "server", "rounds_done": rounds_done, "bytes_up": 0, "bytes_down": 0,
            "seconds": {**seconds, "merge": seconds.get("merge", 0.0) + time.perf_counter() - began}, **_losses(job, server)}

"""Twenty clients, two a round, 200 rounds, in minutes on a CPU: python -m benchmarks.papers.toy

A small regression in the place of a language model, so that many rounds, learning rates and seeds are affordable; the rounds are
the library's own (Server, Cohort, merges). A network of two layers is to become another one, whose weights differ from its own by
15 %, full-rank and of falling spectrum, as fine-tuning changes a model; every client sees inputs around a mean of its own. Error:
mean squared on fresh inputs of all clients, over that of the network at the start (1: nothing learnt).
"""
import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.measure import RESULTS
from flora.adapter import Adapters
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.data.batches import Batch
from flora.nn import applied, target_shapes
from flora.seeds import derive
from flora.server import Server, first_broadcast
from flora.speed import device_name
from flora.spread import paired, spread
from flora.strategies import come_home, leave_home, strategy_named
from flora.tables import Page, plus_minus
from flora.versions import bring_to

IN, HIDDEN, OUT, RANK = 32, 64, 24, 4
CLIENTS, SAMPLED, ROWS = 20, 2, 64
MARKS = (10, 50, 100, 150, 200)
RATES = (2e-3, 5e-3, 1e-2, 2e-2)
PLAIN = ("fedit", "zeropad", "hetlora", "flexlora", "florist", "ffa", "rolora", "fedex", "fedsa", "fedsvd", "fedsb", "raflora",
         "full", "centralized", "standalone")
ENTRIES: dict[str, dict[str, str]] = {"flora": {}, "flora:start=warm": {"start": "warm"}, "flora:start=shared": {"start": "shared"},
                                      **{name: {} for name in PLAIN}}
TARGETS = ("first", "second")
PUBLISHED = RESULTS / device_name() / "papers" / "toy.json"


class Net(nn.Module):
    """second(tanh(first(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Squares:
    """The mean squared error of a row {"x", "y"} as a client's loss."""
    packs = False

    def sequences(self, row: dict) -> Sequence[dict]:
        return ({"input_ids": [0], "labels": [-100]},)

    def terms(self, row: dict) -> int:
        return 1

    def __call__(self, model: Net, batch: Batch) -> Tensor:
        x, y = (torch.stack([row[name] for row in batch.rows]) for name in ("x", "y"))
        return (model(x) - y).square().mean(1)


@dataclass(frozen=True)
class Task:
    """The network that all start from, the clients, and fresh inputs with what is to come out."""
    net: Net
    clients: list[LocalClient]
    x: Tensor
    y: Tensor
    variance: float


def task(seed: int) -> Task:
    """The same for every method and learning rate."""
    draw = torch.Generator().manual_seed(derive(seed, "toy"))
    nets = [Net(), Net()]
    with torch.no_grad():
        for name in TARGETS:
            weight = getattr(nets[0], name).weight
            weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
            U, S, V = torch.linalg.svd(torch.randn(weight.shape, generator=draw), full_matrices=False)
            falling = 0.6 ** torch.arange(len(S))
            delta = (U * falling) @ V * (0.15 * weight.norm() / falling.norm())
            getattr(nets[1], name).weight.copy_(weight + delta)
        means = 0.3 * torch.randn(CLIENTS, IN, generator=draw)
        inputs = [means[k] + torch.randn(ROWS + 50, IN, generator=draw) for k in range(CLIENTS)]
        wanted = [nets[1](x) for x in inputs]
        x, y = (torch.cat([one[ROWS:] for one in some]) for some in (inputs, wanted))
        variance = float((nets[0](x) - y).square().mean())
    clients = [LocalClient(f"client-{k}", [{"x": a, "y": b} for a, b in zip(inputs[k][:ROWS], wanted[k][:ROWS], strict=True)],
                           RANK, 2 * RANK) for k in range(CLIENTS)]
    return Task(nets[0], clients, x, y, variance)


def error(model: Net, job: Task, views: Sequence[Adapters]) -> float:
    """The mean over the views of the model (the base and these adapters)."""
    found = []
    for adapters in views:
        with torch.no_grad(), applied(model, adapters):
            found.append(float((model(job.x) - job.y).square().mean()) / job.variance)
    return sum(found) / len(found)


def rounds(entry: str, rate: float, seed: int, count: int) -> dict[int, float]:
    """The error after the rounds of MARKS, of one run."""
    job, name, options = task(seed), entry.partition(":")[0], ENTRIES[entry]
    rule, clients, sampled = strategy_named(name), job.clients, SAMPLED
    if rule.pooled:
        clients, sampled = [LocalClient("everyone", [row for c in job.clients for row in c.rows], RANK, 2 * RANK)], 1
    pruning = {"rank_decay": 0.99, "rank_penalty": 5e-3} if rule.prunes else {}
    config = TrainConfig(rate, max_steps=20 * (SAMPLED if rule.pooled else 1), per_device_train_batch_size=16, seed=seed,
                         loss=Squares(), **pruning)
    model, shapes = job.net, target_shapes(job.net, TARGETS)
    first = replace(first_broadcast(name, shapes, clients, seed, options), run="toy")
    server = Server(name, clients, first, sampled / len(clients), seed=seed, options=options, shapes=shapes)
    home: dict[str, Adapters] = {}
    found = {}
    for number in range(count):
        sent = server.broadcast
        own = {n: held if sent.start is None else come_home(sent.start, held, rule.home) for n, held in home.items()}
        party = [replace(c, start=own.get(c.name)) for c in server.sample(number)]
        updates = Cohort(model, party, config, TARGETS).fit(sent)
        if not updates:
            return {mark: float("nan") for mark in MARKS if mark <= count}
        home.update({u.client: u.adapters for u in updates} if rule.home else {})
        server.close([replace(u, adapters=leave_home(u.adapters, rule.home)) for u in updates])
        server.shrink(updates)
        if number + 1 in MARKS:
            bring_to(model, server.broadcast)
            start = server.broadcast.start
            mine = [held if start is None else come_home(start, held, rule.home) for held in home.values()]
            found[number + 1] = error(model, job, mine if rule.home else [start or {}])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--entries", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    runs = [(entry, rate, seed) for entry in options.entries for rate in options.rates for seed in options.seeds]
    rows = [{"entry": entry, "rate": rate, "seed": seed, "errors": rounds(entry, rate, seed, options.rounds)}
            for entry, rate, seed in track(runs, "runs", console=Console(stderr=True))]
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(PUBLISHED.read_text()) if PUBLISHED.exists() else []
    new = {(row["entry"], row["rate"], row["seed"]) for row in rows}
    rows = [row for row in known if (row["entry"], row["rate"], row["seed"]) not in new] + json.loads(json.dumps(rows))
    PUBLISHED.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    for page in pages(rows):
        Console().print(page.rich())


def pages(rows: Sequence[dict]) -> list[Page]:
    """Every method at its own best rate, and the three starts at every rate, by round."""
    by: dict[tuple[str, float], dict[int, dict[str, float]]] = {}
    for row in rows:
        by.setdefault((row["entry"], row["rate"]), {})[row["seed"]] = row["errors"]
    marks = list(max((row["errors"] for row in rows), key=len))
    entries, rates = (list(dict.fromkeys(row[name] for row in rows)) for name in ("entry", "rate"))

    def last(key: tuple[str, float]) -> dict[int, float]:
        return {seed: found.get(marks[-1]) for seed, found in by[key].items()}

    def line(key: tuple[str, float]) -> list[str]:
        return [plus_minus(spread([found.get(mark) for found in by[key].values()]), ".3f") for mark in marks]

    def final(key: tuple[str, float]) -> float:
        mean = spread(list(last(key).values()))["mean"]
        return float("inf") if mean is None else mean

    best = {entry: min(((entry, rate) for rate in rates if (entry, rate) in by), key=final) for entry in entries}
    first, table = last(best[entries[0]]), []
    for entry in sorted(entries, key=lambda entry: final(best[entry])):
        rate, tried = best[entry][1], [rate for rate in rates if (entry, rate) in by]
        says = "–" if entry == entries[0] else paired(last(best[entry]), first)["says"]
        table.append([entry, f"{rate:g}" + (" (edge)" if rate in (min(tried), max(tried)) else ""), *line(best[entry]), says])
    columns = [f"round {mark}" for mark in marks]
    made = [Page("Every method at its own best learning rate", ["entry", "rate", *columns, f"than {entries[0]}"], table)]
    starts = [entry for entry in entries if entry.startswith("flora:") or entry in ("flora", "fedit")]
    cells = [[entry, f"{rate:g}", *line((entry, rate))] for rate in sorted(rates) for entry in starts if (entry, rate) in by]
    return [*made, Page("Starts, by learning rate", ["entry", "rate", *columns], cells)]


if __name__ == "__main__":
    main()

"""HierFedLoRA on eighty devices in minutes on a CPU: python -m benchmarks.papers.hierarchy [--skews 0.1 0.5] [--seeds 0 1 2]

The tweets, their labels skewed over the clients, a fleet of three classes, simulated time; groups, chooser, clock, servers and
cohorts are the library's own. In the place of a language model a classifier that learns in minutes: the mean of SmolLM2's token
embeddings, four residual blocks and a head, trained on one in 64 of the tweets that no client has; clients adapt the blocks.
A block's adapter is a quarter of one of SmolLM2's in bytes, and the devices' seconds a block are a quarter of what those of
hierfedlora/common.yaml take, so the shares of transfer and training are those of SmolLM2. Every run goes on for as many simulated
seconds.
"""
import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.measure import RESULTS
from benchmarks.papers.classifier import BLOCKS, LABELS, TARGETS, Classifier, Labels, base, scores, tweets
from flora import skew as labels
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.config import RunConfig, parse
from flora.data import Partition, partition
from flora.downlink import Downlink
from flora.engines.hierarchy import hierarchy_of
from flora.engines.traffic import Traffic
from flora.group import Group, GroupCohort
from flora.grouping import histograms
from flora.nn import applied, target_shapes
from flora.plots import draw
from flora.server import Server, first_broadcast
from flora.speed import device_name
from flora.spread import over_seeds
from flora.tables import Page, clock
from flora.timing import by_clock
from flora.versions import bring_to

RANK, STEPS, ROWS, HELD = 4, 5, 4, 20
FLEET = [{"name": "phone", "count": 40, "seconds_per_layer_step": 0.06, "memory_mb": 2000, "up_mbps": 5, "down_mbps": 20,
          "jitter": 0.2},
         {"name": "laptop", "count": 30, "seconds_per_layer_step": 0.02, "memory_mb": 8000, "up_mbps": 20, "down_mbps": 80,
          "jitter": 0.1},
         {"name": "desk", "count": 10, "seconds_per_layer_step": 0.008, "memory_mb": 16000, "up_mbps": 50, "down_mbps": 200,
          "jitter": 0.1}]
CHOSEN = {"groups": {"count": 8, "choose": True, "rank": 16}, "round_deadline": 12.0}
ENTRIES: dict[str, dict] = {
    "flora": {}, "HierFedLoRA": CHOSEN, "fedit": {"strategy": "fedit"}, "hetlora": {"strategy": "hetlora"},
    "flexlora": {"strategy": "flexlora"}, "ffa": {"strategy": "ffa"},
    "random groups": {**CHOSEN, "groups": {**CHOSEN["groups"], "by": "random"}},
    "groups of alike": {**CHOSEN, "groups": {**CHOSEN["groups"], "by": "similar"}},
    "no chooser": {"groups": {"count": 8, "rank": 16, "inner_rounds": 4}},
    "no frequency": {"groups": {"count": 8, "rank": 16, "inner_rounds": 1, "depth": 2}},
    "averages inside": {**CHOSEN, "groups": {**CHOSEN["groups"], "inner": "fedit"}}}
METHODS = ("flora", "HierFedLoRA", "fedit", "hetlora", "flexlora", "ffa")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNED = (*METHODS, "averages inside")
DOCS = RESULTS.parents[1] / "docs"
PUBLISHED = RESULTS / device_name() / "papers" / "hierarchy.json"


def run(entry: str, skew: float, seed: int, seconds: float, rate: float) -> list[dict]:
    """One run until so many simulated seconds are over: rows of round, seconds, loss, accuracy, bytes and what groups chose."""
    config = parse({"strategy": "flora", "num_clients": 80, "lora_r": RANK, "lora_alpha": "2r", "downlink": "auto", "seed": seed,
                    "fleet": FLEET, **ENTRIES[entry]}, entry)
    data, mine = tweets(), (~tweets().public).nonzero()[:, 0]
    held, rows = mine[::8], mine[torch.arange(len(mine)) % 8 != 0]
    spec = Partition(dirichlet_alpha=skew, label="label", equal_sizes=True)
    dealt = partition([{"label": LABELS[data.y[i]]} for i in rows], 80, spec, seed)
    own = {name: rows[indices] for name, indices in dealt.items()}
    clients = [LocalClient(name, [{"x": data.x[i], "y": data.y[i]} for i in some[HELD:]], RANK, 2 * RANK)
               for name, some in own.items()]
    model = Classifier(data.x.shape[1])
    model.load_state_dict(base())
    return [*_rounds(config, model.requires_grad_(False), clients, own, held, seconds, rate)]


def _rounds(config: RunConfig, model: nn.Module, clients: Sequence[LocalClient], own: Mapping[str, Tensor], held: Tensor,
            seconds: float, rate: float):
    found = histograms({name: [{"label": LABELS[tweets().y[i]]} for i in some] for name, some in own.items()})
    shapes = target_shapes(model, TARGETS)
    tree = hierarchy_of(config, shapes, clients, found, {client.name: STEPS for client in clients})
    server = Server(config.strategy, tree.everybody(), first_broadcast(config.strategy, shapes, tree.everybody(), config.seed), 1.0,
                    config.weighting, config.seed, downlink=Downlink(config.downlink, config.downlink_tol), shapes=shapes)
    pruning = {"rank_decay": 0.99, "rank_penalty": 5e-3} if server.strategy.prunes else {}
    train = TrainConfig(rate, max_steps=STEPS, per_device_train_batch_size=ROWS, seed=config.seed, loss=Labels(), **pruning)
    traffic, number, now = Traffic(), 0, 0.0
    traffic.down(server, server.sample(0))
    loss, accuracy = scores(model, held)
    yield {"round": 0, "seconds": 0.0, "loss": loss, "accuracy": accuracy, "bytes": 0, "lost": 0, "chosen": {}}
    while True:
        server.clients = tree.parties(traffic.received) if tree.members else server.clients
        sent = server.broadcast
        bring_to(model, sent)
        due, clock = tree.clock(number, server.sample(number), traffic.received, sent.train)
        now += float(clock.seconds)
        if now > seconds:
            return
        groups = [party for party in due if isinstance(party, Group)]
        watched = {g.name: torch.cat([own[c.name][:HELD] for c in g.clients]) for g in groups}
        before = {name: scores(model, some)[0] for name, some in watched.items()}
        updates = (GroupCohort if groups else Cohort)(model, due, train, TARGETS, max_tokens_per_batch=10_000).fit(sent)
        for update in updates if groups else []:
            group = next(g for g in groups if g.name == update.client)
            with applied(model, update.adapters):
                after = scores(model, watched[update.client])[0]
            tree.observe([{"kind": "client", "client": update.client, "inner_rounds": group.inner_rounds, "depth": group.depth,
                           "eval_loss_before": before[update.client], "eval_loss_after": after}])
        up = sum(Traffic.up(server, updates, sent).values())
        server.close(updates, {name: model.get_submodule(name).weight for name in shapes})
        server.shrink(updates)
        number += 1
        down = sum(traffic.down(server, server.sample(number)).values())
        bring_to(model, server.broadcast)
        with applied(model, server.broadcast.start or {}):
            loss, accuracy = scores(model, held)
        yield {"round": number, "seconds": now, "loss": loss, "accuracy": accuracy, "bytes": up + down, "lost": len(clock.lost),
               "chosen": {g.name: [g.inner_rounds, g.depth] for g in groups}}


def tuned(entries: Sequence[str], skew: float, seconds: float) -> dict[str, float]:
    """Every method's best rate of RATES on seed 0: of the lowest loss at the end; parts of HierFedLoRA take its own."""
    grid = [(entry, rate) for entry in entries if entry in TUNED for rate in RATES]
    last = {key: run(key[0], skew, 0, seconds, key[1])[-1]["loss"] for key in track(grid, "rates", console=Console(stderr=True))}
    best = {entry: min(RATES, key=lambda rate: last[entry, rate]) for entry in entries if entry in TUNED}
    return {entry: best.get(entry, best.get("HierFedLoRA", RATES[0])) for entry in entries}


def entries_of(rows: Sequence[dict], skew: float) -> list[dict]:
    """The runs of one skew as flora compare's entries, with their clocks."""
    made = []
    for name in ENTRIES:
        mine = [row for row in rows if row["entry"] == name and row["skew"] == skew]
        runs = {}
        for row in mine:
            points = {p["round"]: {"eval_loss": p["loss"], "eval_label_accuracy": p["accuracy"]} for p in row["points"]}
            runs[row["seed"]] = {"rounds": points, "simulated": {p["round"]: p["seconds"] for p in row["points"]},
                                 "bytes_up": 0, "bytes_down": sum(p["bytes"] for p in row["points"]), "seconds": 0.0}
        if runs:
            made.append({"name": f"{name}, {mine[0]['rate']:g}", "seeds": list(runs), "runs": runs, **over_seeds(runs)})
    for entry, found in zip(made, by_clock(made), strict=True):
        entry["clock"] = found
    return made


def pages(rows: Sequence[dict]) -> list[Page]:
    """For every skew: at equal time, time to what FLoRA ends with, and what groups did."""
    made = []
    for skew in sorted({row["skew"] for row in rows}):
        made += [replace(page, title=f"Dirichlet {skew:g}, {page.title}") for page in clock(entries_of(rows, skew))]
        cells = []
        for name in ENTRIES:
            points = [p for row in rows if row["entry"] == name and row["skew"] == skew for p in row["points"][1:]]
            took = [pair for p in points for pair in p["chosen"].values()]
            inner, depth = (f"{statistics.fmean(pair[i] or BLOCKS for pair in took):.1f}" if took else "–" for i in (0, 1))
            if points:
                cells.append([name, inner, depth, f"{statistics.fmean(p['lost'] for p in points):.1f}",
                              f"{statistics.fmean(p['bytes'] for p in points) / 1e6:.1f}"])
        made.append(Page(f"Dirichlet {skew:g}: inner rounds and depth of a group, means over groups and rounds",
                         ["entry", "inner rounds", "depth", "clients lost a round", "MB a round, with the server"], cells))
    return made


def published() -> list[dict]:
    """The runs of all machines."""
    return [row for path in sorted(RESULTS.glob("*/papers/hierarchy.json")) for row in json.loads(path.read_text())]


def show(rows: Sequence[dict]) -> None:
    """Prints the tables; draws the lines of every skew and the labels of clients and groups into docs/."""
    for page in pages(rows):
        Console().print(page.rich())
    for number in sorted({row["skew"] for row in rows}):
        for what, names in (("methods", METHODS), ("parts", ["flora", *(name for name in ENTRIES if name not in METHODS)])):
            some = [row for row in rows if row["entry"] in {*names, "HierFedLoRA"}]
            draw(entries_of(some, number), DOCS / f"hierarchical-{what}-{number:g}.svg")
    dealt = {"dirichlet_alpha": 0.1, "label": "label", "equal_sizes": True}
    config = parse({"num_clients": 80, "dataset": "tweets", "partition": dealt})
    labels.draw(labels.skew(config, 8), DOCS / "hierarchical-groups.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skews", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--entries", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--seconds", type=float, default=90.0, help="simulated, of every run")
    parser.add_argument("--rate", type=float, help="of all; left out: each method's best of a grid, on seed 0 and half the time")
    parser.add_argument("--show", action="store_true", help="tables and plots of what was published; nothing runs")
    options = parser.parse_args()
    if options.show:
        return show(published())
    known = json.loads(PUBLISHED.read_text()) if PUBLISHED.exists() else []
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    for skew in options.skews:
        had = {row["entry"]: row["rate"] for row in known if row["skew"] == skew}
        new = [entry for entry in options.entries if entry not in had or options.rate]
        rates = dict.fromkeys(new, options.rate) if options.rate else had | tuned(new, skew, options.seconds / 2)
        jobs = [(entry, seed) for seed in options.seeds for entry in options.entries]
        for entry, seed in track(jobs, f"Dirichlet {skew:g}", console=Console(stderr=True)):
            row = {"entry": entry, "skew": skew, "seed": seed, "rate": rates[entry],
                   "points": run(entry, skew, seed, options.seconds, rates[entry])}
            known = [old for old in known if (old["entry"], old["skew"], old["seed"]) != (entry, skew, seed)] + [row]
            PUBLISHED.write_text("[\n" + ",\n".join(map(json.dumps, known)) + "\n]\n")
    show(known)


if __name__ == "__main__":
    main()

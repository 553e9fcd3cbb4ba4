"""Clients that lie, with and without a guard: python -m benchmarks.papers.attackers [--skews inf 1] [--seeds 0 1 2]

Ten clients of ranks 16 to 4 train the classifier of tweets (classifier.py) for some rounds; two of them send something else than
they trained: its negative, four times its negative, ten times it, or noise ten times as long. Accuracy is on tweets that no client
has, for every guard, beside no attack and no guard.
"""
import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.measure import RESULTS
from benchmarks.papers.classifier import LABELS, TARGETS, Classifier, Labels, base, scores, tweets
from flora.adapter import Adapter, norm
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.data import Partition, partition
from flora.inbox import Trust
from flora.messages import Update
from flora.nn import applied, target_shapes
from flora.server import Server, first_broadcast
from flora.speed import device_name
from flora.spread import spread
from flora.strategies.robust import Robust
from flora.tables import Page, plus_minus
from flora.versions import bring_to

RANKS = (16, 16, 12, 12, 8, 8, 8, 4, 4, 4)
LIARS, ROUNDS, STEPS, ROWS, RATE = (2, 7), 15, 20, 8, 1e-3
GUARDS = ("none", "clip", "krum", "trim")


def _times(factor: float) -> Callable[[Update, int], Update]:
    return lambda update, number: replace(update, adapters={layer: a * factor for layer, a in update.adapters.items()})


def _noise(update: Update, number: int) -> Update:
    """Random factors, ten times as long in every layer as what was trained."""
    draw = torch.Generator().manual_seed(number)
    out = {}
    for layer, a in update.adapters.items():
        made = Adapter(torch.randn(a.A.shape, generator=draw), torch.randn(a.B.shape, generator=draw), a.scale)
        out[layer] = made * (10 * norm(a) / norm(made))
    return replace(update, adapters=out)


ATTACKS: dict[str, Callable[[Update, int], Update]] = {
    "none": lambda update, number: update, "sign flip": _times(-1), "sign flip, 4 times": _times(-4), "10 times": _times(10),
    "noise, 10 times": _noise}


def run(attack: str, guard: str, skew: float, seed: int) -> list[dict]:
    """Loss and accuracy by round, and whom the guard left out."""
    data, mine = tweets(), (~tweets().public).nonzero()[:, 0]
    held, rows = mine[::8], mine[torch.arange(len(mine)) % 8 != 0]
    spec = Partition(iid=True) if math.isinf(skew) else Partition(dirichlet_alpha=skew, label="label", equal_sizes=True)
    dealt = partition([{"label": LABELS[data.y[i]]} for i in rows], len(RANKS), spec, seed)
    clients = [LocalClient(name, [{"x": data.x[i], "y": data.y[i]} for i in rows[indices]], rank, 2 * rank)
               for (name, indices), rank in zip(dealt.items(), RANKS, strict=True)]
    liars = {clients[k].name for k in LIARS}
    model = Classifier(data.x.shape[1]).requires_grad_(False)
    model.load_state_dict(base())
    shapes = target_shapes(model, TARGETS)
    server = Server("flora", clients, first_broadcast("flora", shapes, clients, seed), seed=seed, shapes=shapes,
                    trust=Trust(robust=None if guard == "none" else Robust(guard)))
    train, points = TrainConfig(RATE, max_steps=STEPS, per_device_train_batch_size=ROWS, seed=seed, loss=Labels()), []
    for number in range(ROUNDS):
        updates = Cohort(model, server.sample(number), train, TARGETS, max_tokens_per_batch=10_000).fit(server.broadcast)
        server.close([ATTACKS[attack](u, number) if u.client in liars else u for u in updates])
        bring_to(model, server.broadcast)
        with applied(model, server.broadcast.start or {}):
            loss, accuracy = scores(model, held)
        points.append({"loss": loss, "accuracy": accuracy, "liars_left_out": len(liars & set(server.sifted.left_out)),
                       "honest_left_out": len(set(server.sifted.left_out) - liars)})
    return points


def pages(rows: Sequence[dict]) -> list[Page]:
    """For every skew: accuracy at the end by attack and guard, beside that without either, and how many were left out."""
    made = []
    for skew in dict.fromkeys(row["skew"] for row in rows):
        def ends(attack: str, guard: str, name: str = "accuracy", skew: str = skew) -> list[float]:
            mine = [row["points"] for row in rows if (row["attack"], row["guard"], row["skew"]) == (attack, guard, skew)]
            return [points[-1][name] if name == "accuracy" else statistics.fmean(p[name] for p in points) for points in mine]

        whole = statistics.fmean(ends("none", "none"))
        cells = []
        for attack in ATTACKS:
            for guard in GUARDS:
                found = spread([100 * accuracy for accuracy in ends(attack, guard)])
                out = [statistics.fmean(ends(attack, guard, f"{who}_left_out")) for who in ("liars", "honest")]
                cells.append([f"{attack}; {guard}", plus_minus(found, ".1f"), f"{found['mean'] - 100 * whole:+.1f}",
                              *(f"{count:.2f}" for count in out)])
        data = "clients alike" if skew == "inf" else f"Dirichlet {skew} over clients"
        made.append(Page(f"Two liars in ten, {data}", ["attack; guard", "label accuracy, %", "than no attack, no guard",
                                                        "liars left out a round", "honest left out"], cells))
    return made


def published() -> list[dict]:
    """The runs of all machines."""
    return [row for path in sorted(RESULTS.glob("*/papers/attackers.json")) for row in json.loads(path.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skews", type=float, nargs="+", default=[math.inf, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--show", action="store_true", help="tables of what was published; nothing runs")
    options = parser.parse_args()
    if not options.show:
        rows = [{"attack": attack, "guard": guard, "skew": f"{skew:g}", "seed": seed, "points": run(attack, guard, skew, seed)}
                for skew, seed, attack, guard in track([*itertools.product(options.skews, options.seeds, ATTACKS, GUARDS)], "runs",
                                                       console=Console(stderr=True))]
        path = RESULTS / device_name() / "papers" / "attackers.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for page in pages(published()):
        Console().print(page.rich())


if __name__ == "__main__":
    main()

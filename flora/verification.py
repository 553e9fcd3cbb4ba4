"""`flora verify`: what a run's server made of its clients' saved adapters, against Σ p_k ΔW_k, dense and in fp64.

A round's folder holds every client's adapters and the aggregate (merge and start together), so the sum can be formed once more
by other code than the server's: layer by layer, never two layers at once. What is checked is the aggregate, not the merge into
the base after it.
"""
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from flora.adapter import Adapter, Adapters
from flora.checkpoint import state_of
from flora.config import RunConfig, load, parse
from flora.errors import RunError
from flora.files import safe_name
from flora.formats import load_peft
from flora.messages import Update
from flora.report import read_metrics
from flora.strategies import Strategy, strategy_named
from flora.strategies.base import Terms, by_layer

ROUNDING = 2.0**-22                                             # four roundings of an fp32 number: 1/2 eps each
SHORT = 1e-9                                                    # Σ p this far from 1: the start that was sent counts


class _Cannot(Exception):
    """Why a round is not compared."""


def verify(run: str | Path) -> list[dict[str, Any]]:
    """A row for every round that trained: {"round", "clients", "error", "layer", "layer_error", "exact", "reason"}.

    error = ‖aggregate − Σ p_k ΔW_k‖_F / ‖Σ p_k ΔW_k‖_F over all layers together, layer the worst one with its own error; None with
    a reason where a round, or a layer that travelled as new weights, cannot be compared. What p_k lack to 1
    (server_learning_rate, a factor as weighting, absent layers) counts as the start that was sent, as in strategies.base.
    exact: ‖aggregate − Σ p_k ΔW_k‖_F <= 2⁻²² Σ_i ‖b_i‖ |s_i| ‖a_i‖ over all ranks i of both sides: four fp32 roundings of each.
    Raises RunError for a folder that is not a run, ConfigError, AdapterError for files that cannot be read.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir() or not state_of(folder):
        raise RunError(f"expected the folder of a run at {folder}; got none. Give the output_dir of a run.")
    config = parse({**load(folder / "config.yaml"), "output_dir": str(folder)}, str(folder / "config.yaml"))
    rows = read_metrics(folder)
    refused = {(row["round"], row["client"]) for row in rows if row["kind"] == "failure"}
    trained: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "client" and (row["round"], row["client"]) not in refused:
            trained.setdefault(row["round"], []).append(row)
    return [_round(folder / "rounds", number, trained, config) for number in sorted(trained)]


def _round(folder: Path, number: int, trained: Mapping[int, Sequence[Mapping[str, Any]]], config: RunConfig) -> dict[str, Any]:
    row = {"round": number, "clients": len(trained[number]), "error": None, "layer": None, "layer_error": None, "exact": None,
           "reason": ""}
    try:
        return row | _compared(folder, number, trained, config)
    except _Cannot as reason:
        return row | {"reason": str(reason)}


def _not_comparable(rule: Strategy, config: RunConfig) -> str:
    """Why the aggregate of this run is no sum of what was saved; empty where it is."""
    if config.privacy is not None and config.privacy.level == "client":
        return "the aggregate holds noise (privacy), and clients' parts were clipped"
    if config.robust is not None:
        return f"robust {config.robust} bounds or leaves out what clients sent"
    if config.late == "next":
        return "updates that were late count less in a later round"
    if rule.home:
        what = "every adapter stays" if rule.home == "AB" else f"{rule.home} stays"
        return f"{rule.name}: {what} with its client, so the server holds no ΔW to compare"
    if rule.pooled:
        return f"{rule.name}: one party trains on all rows, so nothing is aggregated"
    return f"{rule.name}: clients train the weights themselves, which are not saved round by round" if rule.dense else ""


def _compared(folder: Path, number: int, trained: Mapping[int, Sequence[Mapping[str, Any]]], config: RunConfig) -> dict[str, Any]:
    """The numbers of a round. Raises _Cannot."""
    rule = strategy_named(config.strategy)
    if reason := _not_comparable(rule, config):
        raise _Cannot(reason)
    here = _kept(folder, number, config)
    if not (here / "aggregate").is_dir() and (here / "dense.json").exists():
        raise _Cannot("all layers travelled as new weights, and are not compared")
    if not (here / "aggregate").is_dir():
        raise _Cannot("no aggregate was saved: the server sent no adapters")
    updates = [_update(here, row, config) for row in trained[number]]
    default = inspect.signature(rule.aggregate).parameters.get("absent")
    absent = config.absent or (default.default if default else "zero")
    step = config.server_learning_rate or 1.0
    layers = by_layer(updates, config.weighting, absent, step)
    earlier = [n for n in trained if n < number]                # before the first round every start has ΔW = 0
    if earlier and (here / "start").is_dir() and any(abs(1.0 - sum(p for _, p in terms)) > SHORT for terms in layers.values()):
        layers = by_layer(updates, config.weighting, absent, step, _sent(folder, max(earlier), config))
    made, note = load_peft(here / "aggregate"), ""
    if (here / "dense.json").exists():
        whole = set(json.loads((here / "dense.json").read_text()))
        layers = {name: terms for name, terms in layers.items() if name not in whole}
        made = {name: a for name, a in made.items() if name not in whole}
        note = f"{len(whole)} layers travelled as new weights and are not compared"
    if not layers:
        raise _Cannot(note)
    return _errors(layers, made) | {"reason": note}


def _kept(folder: Path, number: int, config: RunConfig) -> Path:
    if not (folder / str(number)).is_dir():
        raise _Cannot(f"not kept; keep_rounds ({config.keep_rounds} here) keeps the last ones")
    return folder / str(number)


def _sent(folder: Path, number: int, config: RunConfig) -> Adapters:
    """The start that the round after this one trained from."""
    if not (folder / str(number)).is_dir():
        raise _Cannot(f"the weights do not sum to 1, so the start of round {number} counts, which is not kept (keep_rounds "
                      f"{config.keep_rounds})")
    return load_peft(folder / str(number) / "start") if (folder / str(number) / "start").is_dir() else {}


def _update(here: Path, row: Mapping[str, Any], config: RunConfig) -> Update:
    path = here / "clients" / safe_name(row["client"])
    if not path.is_dir():
        raise _Cannot(f"the adapters of client {row['client']} are not in {path}")
    if config.weighting == "tokens" and not row.get("tokens"):
        raise _Cannot("weighted by tokens, which metrics.jsonl does not tell by client")
    return Update(load_peft(path), row["num_examples"], {"tokens": row.get("tokens", 0)}, client=row["client"])


def _size(a: Adapter) -> float:
    """Σ_i ‖b_i‖ |s_i| ‖a_i‖: what roundings of the factors can change, one part in so many."""
    return float((a.B.double().norm(dim=0) * a.scale.double().abs() * a.A.double().norm(dim=1)).sum())


def _errors(layers: Mapping[str, Terms], aggregate: Adapters) -> dict[str, Any]:
    """Errors layer by layer, one dense layer at a time; a layer that only one side has counts as zero on the other."""
    off, whole, bound, worst = 0.0, 0.0, 0.0, ("", -1.0)
    for name in dict.fromkeys([*layers, *aggregate]):
        terms, made = layers.get(name, []), aggregate.get(name)
        shape = made.shape if made is not None else terms[0][0].shape
        target = torch.zeros(shape, dtype=torch.float64)
        for a, p in terms:
            target += p * a.delta()
        size = float(target.norm())
        error = float((made.delta() - target).norm()) if made is not None else size
        off, whole = off + error**2, whole + size**2
        bound += sum(abs(p) * _size(a) for a, p in terms) + (_size(made) if made is not None else 0.0)
        relative = error / size if size else math.inf if error else 0.0
        worst = max(worst, (name, relative), key=lambda found: found[1])
    error = math.sqrt(off)
    return {"error": error / math.sqrt(whole) if whole else math.inf if error else 0.0, "layer": worst[0],
            "layer_error": worst[1], "exact": error <= ROUNDING * bound}


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: exact, or not, or nothing to compare."""
    compared = [row for row in rows if row["error"] is not None]
    if not compared:
        reasons = list(dict.fromkeys(row["reason"] for row in rows))
        return f"nothing was compared: {'; '.join(reasons) or 'no round has trained'}."
    worst = max(compared, key=lambda row: row["error"])
    of = f"{len(compared)} of {len(rows)} rounds compared"
    wrong = [row for row in compared if not row["exact"]]
    if not wrong:
        return f"exact: the aggregate is Σ p_k ΔW_k to fp32 rounding; largest error {worst['error']:.1e}; {of}."
    return (f"not exact: in {len(wrong)} of them the aggregate is not Σ p_k ΔW_k; largest error {worst['error']:.1e}, in round "
            f"{worst['round']}; {of}.")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of the rows, and what it comes to."""
    table = Table(title="aggregate against Σ p_k ΔW_k, dense, fp64", title_justify="left", box=SIMPLE)
    for name in ("round", "clients", "error", "worst layer's"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst layer", overflow="fold")
    for row in rows:
        if row["error"] is None:
            table.add_row(str(row["round"]), str(row["clients"]), "–", "–", row["reason"])
        else:
            table.add_row(str(row["round"]), str(row["clients"]), f"{row['error']:.1e}", f"{row['layer_error']:.1e}",
                          row["layer"] + (f" ({row['reason']})" if row["reason"] else ""))
    console = Console()
    console.print(table)
    console.print(conclusion(rows), highlight=False, markup=False, soft_wrap=True)

"""Runs on one simulated clock: what each has reached when the quickest is done, and when each reaches what the first ends with.

A number of a run holds from the end of the round after which it was measured until the next: nothing is interpolated.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flora.spread import ACCURACY, LOSS, finite, paired, spread

LABELS = "eval_label_accuracy"


def column(entries: Sequence[Mapping[str, Any]]) -> str:
    """The accuracy that these entries are judged by: of labels where all have it, else of tokens."""
    return LABELS if all(LABELS in entry["final"] for entry in entries) else ACCURACY


def clocked(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all runs of these entries have simulated time."""
    return all(run["simulated"] for entry in entries for run in entry["runs"].values())


def reached(run: Mapping[str, Any], name: str, seconds: float) -> float | None:
    """What a run had at this time: its last number by then; None before the first."""
    done = [number for number, found in run["rounds"].items()
            if name in found and run["simulated"].get(number, math.inf) <= seconds]
    return run["rounds"][max(done)][name] if done else None


def seconds_to(run: Mapping[str, Any], name: str, target: float) -> float | None:
    """When a run was first at least as good as target (a loss: at most), a round's end; None where it never was."""
    better = [run["simulated"][number] for number, found in run["rounds"].items()
              if number in run["simulated"] and finite(found.get(name))
              and (found[name] <= target if name == LOSS else found[name] >= target)]
    return min(better, default=None)


def by_clock(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every entry: "at" {seed: seconds}, when the quickest run ended; "reached" {column: spread} by then, and "less", paired
    with the first entry's; "seconds" {column: spread} until it had what the first entry ended with, of the seeds that got there
    ("count"), and "times": the first entry's seconds over them."""
    names, first = (LOSS, column(entries)), entries[0]
    seeds = [seed for seed in first["runs"] if all(seed in entry["runs"] for entry in entries)]
    at = {seed: min(max(entry["runs"][seed]["simulated"].values()) for entry in entries) for seed in seeds}

    def values(entry: Mapping[str, Any], name: str) -> dict[int, float]:
        found = {seed: reached(entry["runs"][seed], name, at[seed]) for seed in seeds}
        return {seed: math.nan if value is None else value for seed, value in found.items()}

    def until(entry: Mapping[str, Any], name: str) -> dict[int, float]:
        targets = {seed: reached(first["runs"][seed], name, math.inf) for seed in seeds}
        found = {seed: seconds_to(entry["runs"][seed], name, targets[seed]) for seed in seeds if targets[seed] is not None}
        return {seed: seconds for seed, seconds in found.items() if seconds is not None}

    made = []
    for entry in entries:
        took = {name: (until(entry, name), until(first, name)) for name in names}
        made.append({"at": at, "reached": {name: spread(list(values(entry, name).values())) for name in names},
                     "less": {name: paired(values(entry, name), values(first, name)) for name in names},
                     "seconds": {name: spread(list(mine.values())) for name, (mine, _) in took.items()},
                     "times": {name: spread([base[seed] / seconds for seed, seconds in mine.items() if seconds and seed in base])
                               for name, (mine, base) in took.items()}})
    return made

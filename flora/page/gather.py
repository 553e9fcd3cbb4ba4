"""Run folders -> series, as plain data: nothing here draws, and nothing that a file says is believed to have its usual form."""
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.checkpoint import state_of
from flora.config import load
from flora.errors import RunError
from flora.files import safe_name
from flora.report import read_metrics

WHERE = ("seed", "output_dir", "overwrite", "quiet")            # keys in which runs of one series may differ
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One folder: the keys and values of config.yaml, environment.json, how far it came, the rows of metrics.jsonl by kind."""
    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    state: str
    rounds_done: int
    server: Sequence[Row]
    clients: Sequence[Row]
    failures: Sequence[Row]


@dataclass(frozen=True)
class Series:
    """Runs that differ by their seed alone, or one run. left_out: folders of runs that have no finished round yet."""
    name: str
    runs: Sequence[Run]
    left_out: Sequence[str] = ()

    @property
    def first(self) -> Run:
        return self.runs[0]


def number(value: object) -> float | None:
    """A finite number, or None for whatever else a row may hold."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def series_of(places: Sequence[Path]) -> list[Series]:
    """The series of these folders, in their order, each with a name of its own.

    Raises RunError where a folder is missing, no run, given twice, or without a finished round; ConfigError for its config.yaml.
    """
    if not places:
        raise RunError("expected the folder of at least one run; got none")
    twice = [place for n, place in enumerate(places) if place.resolve() in [other.resolve() for other in places[:n]]]
    if twice:
        raise RunError(f"expected every folder once; got {twice[0]} twice")
    found: list[tuple[str, Run]] = []
    left_out: list[str] = []
    for place in places:
        inside = _runs_in(place)
        begun = [(name, folder) for name, folder in inside if (number(state_of(folder)["rounds_done"]) or 0) > 0]
        if not begun:
            said = state_of(inside[0][1])["state"]
            raise RunError(f"expected a run with at least one finished round at {place}; got one that is {said}, with none. Let it "
                           f"finish a round, or go on with it: flora resume {inside[0][1]}")
        left_out += [str(folder) for _, folder in inside if folder not in [f for _, f in begun]]
        found += [(name, _read(folder)) for name, folder in begun]
    together: dict[str, list[tuple[str, Run]]] = {}
    for name, run in found:
        key = {k: v for k, v in run.config.items() if k not in WHERE}
        together.setdefault(json.dumps(key, sort_keys=True, default=str), []).append((name, run))
    names = _named([_common([name for name, _ in members]) for members in together.values()])
    return [Series(name, [run for _, run in members], left_out if n == 0 else ())
            for n, (name, members) in enumerate(zip(names, together.values(), strict=True))]


def _runs_in(place: Path) -> list[tuple[str, Path]]:
    """(name, folder) of a run, or of the runs of a comparison: DIR/ENTRY/seed-N. Raises RunError where there is neither."""
    if not place.is_dir():
        raise RunError(f"expected the folder of a run at {place}; there is {'a file' if place.exists() else 'none'}. Give the "
                       "output_dir of a run, such as runs/demo.")
    if state_of(place):
        return [(place.resolve().name, place)]
    order = _asked(place)
    found = sorted(place.glob("*/seed-*/run.json"), key=_by_seed)
    found.sort(key=lambda path: order.get(path.parent.parent.name, len(order)))
    inside = [path.parent for path in found if state_of(path.parent)]
    if not inside:
        raise RunError(f"expected the folder of a run, or of flora compare, at {place}; got one without run.json. Give the "
                       "output_dir of a run, such as runs/demo.")
    return [(folder.parent.name, folder) for folder in inside]


def _asked(place: Path) -> dict[str, int]:
    """The places of a comparison's entries in the order in which they were asked for, by the names of their folders."""
    try:
        names = [str(one["name"]) for one in json.loads((place / "compare.json").read_text(encoding="utf-8"))["variants"]]
    except (OSError, ValueError, KeyError, TypeError):          # not finished, or not ours: by name
        names = []
    return {safe_name(name): n for n, name in enumerate(names)}


def _by_seed(path: Path) -> tuple[str, int, str]:
    entry, seed = path.parent.parent.name, path.parent.name.removeprefix("seed-")
    return entry, int(seed) if seed.isdigit() else 0, seed


def _read(folder: Path) -> Run:
    """A run from its files. Raises RunError where no row of the server can be read, ConfigError for config.yaml."""
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    rows, state = [row for row in read_metrics(folder) if isinstance(row, dict)], state_of(folder)
    done = int(number(state["rounds_done"]) or 0)               # rows beyond are of a round that is not finished
    server = [row for row in rows if row.get("kind") == "server" and 0 <= _count(row, "rounds_done") <= done]
    clients, failures = ([row for row in rows if row.get("kind") == kind and 0 <= _count(row, "round") < done]
                         for kind in ("client", "failure"))
    if not server:
        raise RunError(f"expected the server's rows in {folder / 'metrics.jsonl'}; got none. Without them there is nothing to "
                       "show.")
    environment = environment if isinstance(environment, dict) else {}
    return Run(folder, load(folder / "config.yaml"), environment, str(state["state"]), done, server, clients, failures)


def _count(row: Row, key: str) -> float:
    """A number of rounds in a row, -1 where it has none."""
    found = number(row.get(key))
    return -1.0 if found is None else found


def _common(names: Sequence[str]) -> str:
    """What the names of several seeds begin with, without the seed."""
    if len(set(names)) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    start = "".join(column[0] for column in letters).rstrip("-_. 0123456789").removesuffix("seed").rstrip("-_. ")
    return start or names[0]


def _named(names: Sequence[str]) -> list[str]:
    """The same names, told apart by a number where several are equal."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out

"""What is worked out from a series: numbers by round with their spread, clients, seconds, and the spectrum of the aggregate."""
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.adapter import compress
from flora.errors import FloraError
from flora.formats import load_peft
from flora.page.gather import Row, Run, Series, number
from flora.spread import spread

ENERGIES = (0.9, 0.99)
DENSE_FLOPS = 1e11                                              # of flora verify, beyond which a page does not wait for it


def by_round(series: Series, key: str) -> dict[int, dict[str, Any]]:
    """A number of the server's rows by rounds done: mean, sd and count over the runs, as spread gives them."""
    found: dict[int, list[float]] = {}
    for run in series.runs:
        once = {int(row["rounds_done"]): value for row in run.server if (value := number(row.get(key))) is not None}
        for done, value in once.items():
            found.setdefault(done, []).append(value)
    return {done: spread(found[done]) for done in sorted(found)}


def over_clients(series: Series, key: str) -> dict[int, tuple[float, float, float, float, float]]:
    """Minimum, lower quartile, median, upper quartile and maximum of a number of the clients' rows, by rounds done."""
    found: dict[int, list[float]] = {}
    for row in (row for run in series.runs for row in run.clients):
        if (value := number(row.get(key))) is not None:
            found.setdefault(int(row["round"]) + 1, []).append(value)
    return {done: _five(found[done]) for done in sorted(found)}


def _five(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return min(values), quartiles[0], quartiles[1], quartiles[2], max(values)


def summed(rows: Iterable[Row], key: str) -> float:
    return sum(number(row.get(key)) or 0.0 for row in rows)


def seconds(row: Row) -> dict[str, float]:
    """Seconds by phase of a row."""
    given = row.get("seconds")
    found = given if isinstance(given, dict) else {}
    return {str(name): value for name, one in found.items() if (value := number(one)) is not None}


def phases(series: Series) -> dict[str, float]:
    """Seconds by phase of a whole run, the mean over the runs, the longest first."""
    sums: dict[str, float] = {}
    for row in (row for run in series.runs for row in run.server):
        for name, value in seconds(row).items():
            sums[name] = sums.get(name, 0.0) + value / len(series.runs)
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Member:
    """A client of one run: its first and last numbers, and the sums over its rounds. Bytes in bytes, seconds in seconds."""
    name: str
    rank: float | None
    alpha: float | None
    rows: float | None
    rounds: int
    loss: tuple[float | None, float | None]
    accuracy: tuple[float | None, float | None]
    bytes_up: float
    bytes_down: float
    seconds: float

    @property
    def change(self) -> float | None:
        before, after = self.loss
        return None if before is None or after is None else after - before


def members(run: Run) -> list[Member]:
    """The clients of a run, those of the largest rank first."""
    own: dict[str, list[Row]] = {}
    for row in run.clients:
        own.setdefault(str(row.get("client")), []).append(row)
    found = [_member(name, rows) for name, rows in own.items()]
    return sorted(found, key=lambda one: (-(one.rank or 0), one.name))


def _member(name: str, rows: Sequence[Row]) -> Member:
    def ends(measure: str) -> tuple[float | None, float | None]:
        before = [v for row in rows if (v := number(row.get(f"eval_{measure}_before"))) is not None]
        after = [v for row in rows if (v := number(row.get(f"eval_{measure}_after"))) is not None]
        return before[0] if before else None, after[-1] if after else None

    rank, alpha, examples = (number(rows[-1].get(key)) for key in ("rank", "alpha", "num_examples"))
    return Member(name, rank, alpha, examples, len(rows), ends("loss"), ends("accuracy"), summed(rows, "bytes_up"),
                  summed(rows, "bytes_down"), sum(sum(seconds(row).values()) for row in rows))


def last_round(run: Run) -> Path | None:
    """The folder of the last round whose adapters were kept."""
    kept = [path for path in (run.folder / "rounds").glob("*") if path.name.isdigit()]
    return max(kept, key=lambda path: int(path.name), default=None)


def kind(layer: str) -> str:
    """The last word of a layer's name: q_proj, down_proj; of a number (a sequence's layer), the word before it."""
    words = [word for word in layer.split(".") if not word.isdigit()]
    return words[-1] if words else layer


def spectrum(run: Run) -> tuple[dict[str, list[float]], str]:
    """(singular values of ΔW by layer, falling, of the last aggregate that was kept; "") or ({}, why there are none).

    Through the small core of compress, whose balanced factors have ‖A_i‖ = √σ_i: nothing dense is formed.
    """
    here = last_round(run)
    if here is None:
        return {}, "no round's adapters were kept; run with keep_rounds: 1 or more"
    if not (here / "aggregate").is_dir():
        return {}, "the server sent no adapters in the last round that was kept, so there is no aggregate of low rank"
    try:
        made = load_peft(here / "aggregate")
    except FloraError as error:
        return {}, str(error)
    return {layer: compress(a).A.double().norm(dim=1).square().tolist() for layer, a in made.items()}, ""


def ranks_for(sigma: Sequence[float], share: float) -> int:
    """How many of the largest singular values hold this share of Σ σ²."""
    whole, held = sum(s * s for s in sigma), 0.0
    for count, s in enumerate(sigma, 1):
        held += s * s
        if held >= share * whole * (1 - 1e-12):
            return count
    return len(sigma)


def product_errors(run: Run) -> tuple[list[dict[str, Any]], str]:
    """(the rows of flora verify, "") or ([], why it was not run)."""
    from flora.verification import verify

    if last_round(run) is None:
        return [], "no round's adapters were kept (keep_rounds: 0), so the aggregate cannot be checked against them"
    try:
        if (flops := _cost(run)) > DENSE_FLOPS:
            return [], (f"not computed here, as forming every ΔW takes {flops:.0e} operations: flora verify {run.folder}")
        return verify(run.folder), ""
    except (FloraError, OSError) as error:
        return [], str(error)
    except (KeyError, TypeError) as error:                      # rows that no run of ours wrote
        return [], f"metrics.jsonl has rows that flora verify cannot read ({type(error).__name__}: {error})"


def _cost(run: Run) -> float:
    """Operations of flora verify, by the sizes of the factors on the disk: 2 · out · in for every rank of both sides."""
    total = 0.0
    for folder in (run.folder / "rounds").glob("[0-9]*"):
        for one in (folder / "aggregate", *(folder / "clients").glob("*")):
            if one.is_dir():
                total += sum(2.0 * a.rank * a.shape[0] * a.shape[1] for a in load_peft(one).values())
    return total


def carried_errors(run: Run) -> dict[str, float]:
    """The largest of each error that rows carry: of the downlink's form, of merges beside a base, of groups' compression."""
    found: dict[str, float] = {}
    for row in (*run.server, *run.clients):
        for key in ("downlink_error", "merge_error", "compress_error"):
            if (value := number(row.get(key))) is not None:
                found[key] = max(found.get(key, 0.0), value)
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's keys with a dot for those of its parts."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out

"""What several seeds say: means, standard deviations, and differences paired seed by seed.

Two methods with one seed share data, order and sampling, so their difference has less noise than either loss: the spread of the
differences, not that of the losses, tells a method from chance.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flora.errors import RunError

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)     # Student's t, 97.5 %, 1 to 10 degrees
NORMAL = 1.959964
LOSS, ACCURACY = "eval_loss", "eval_accuracy"
DERIVED = ("eval_perplexity",)                                  # exp(loss): one fact, one column


def finite(value: object) -> bool:
    """A number that can be averaged."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "sd", "count"} of numbers; sd with n - 1 below, None for one. Not finite (a diverged run): no mean."""
    if not values or not all(map(finite, values)):
        return {"mean": None, "sd": None, "count": len(values)}
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {"mean": mean, "sd": math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None, "count": len(values)}


def t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %: from a table up to 10 degrees of freedom, above by its expansion in 1 / degrees (to 0.1 %)."""
    if degrees <= len(QUANTILES):
        return QUANTILES[degrees - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def paired(values: Mapping[int, float], first: Mapping[int, float]) -> dict[str, Any]:
    """The differences values - first of two entries' numbers by seed: mean, sd, bound, and what they say.

    bound = t · sd / √n with Student's t at 97.5 % (95 % two-sided) for n - 1 degrees of freedom. |mean| <= bound is "within the
    spread", more is "lower" or "higher"; one seed says nothing of it, nor does a seed that diverged.
    """
    seeds = [seed for seed in values if seed in first]
    found = spread([values[seed] - first[seed] for seed in seeds])
    bound = None if found["sd"] is None else t_quantile(len(seeds) - 1) * found["sd"] / math.sqrt(len(seeds))
    if not seeds:
        says = "no seed in common"
    elif found["mean"] is None:
        says = "a seed diverged"
    elif bound is None:
        says = "one seed: no spread known"
    elif abs(found["mean"]) <= bound:
        says = "within the spread"
    else:
        says = "lower" if found["mean"] < 0 else "higher"
    return {**found, "bound": bound, "says": says}


def numbers(rows: Sequence[Mapping[str, Any]], folder: object) -> dict[str, Any]:
    """One run from its rows: what was evaluated, and the simulated seconds until then if it has any, by rounds done; bytes and
    seconds in all.

    Raises RunError where no row has a loss.
    """
    server = [row for row in rows if row["kind"] == "server"]
    rounds = {row["rounds_done"]: {name: value for name, value in row.items() if name.startswith("eval_") and name not in DERIVED
                                   and isinstance(value, (int, float)) and not isinstance(value, bool)} for row in server}
    rounds = {number: found for number, found in rounds.items() if LOSS in found}
    if not rounds:
        raise RunError(f"expected the evaluations of a finished run in {folder}/metrics.jsonl; got none. Delete {folder}, and "
                       "compare again.")
    simulated = {row["rounds_done"]: row["simulated_total"] for row in server if "simulated_total" in row}
    simulated = {0: 0.0, **simulated} if simulated else {}
    return {"folder": str(folder), "rounds": rounds, "simulated": simulated, "bytes_up": sum(row["bytes_up"] for row in server),
            "bytes_down": sum(row["bytes_down"] for row in server),
            "seconds": sum(sum(row["seconds"].values()) for row in server)}


def over_seeds(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """An entry from its runs by seed: final and by_round {column: ...} as spread gives them, best (the round of the lowest mean
    loss among those that every seed has), and the means of bytes and seconds."""
    columns = list(dict.fromkeys(name for run in runs.values() for found in run["rounds"].values() for name in found))
    last = {seed: run["rounds"][max(run["rounds"])] for seed, run in runs.items()}
    by_round: dict[str, dict[int, dict[str, Any]]] = {}
    for name in columns:
        counts = sorted({number for run in runs.values() for number in run["rounds"]})
        values = {number: [run["rounds"][number][name] for run in runs.values() if name in run["rounds"].get(number, {})]
                  for number in counts}
        by_round[name] = {number: spread(found) for number, found in values.items() if found}
    whole = {number: found["mean"] for number, found in by_round[LOSS].items()
             if found["count"] == len(runs) and found["mean"] is not None}
    best = min(whole, key=whole.__getitem__, default=None)
    return {"final": {name: spread([found[name] for found in last.values() if name in found]) for name in columns},
            "final_by_seed": {name: {seed: found[name] for seed, found in last.items() if name in found} for name in columns},
            "by_round": by_round, "best": None if best is None else {"rounds_done": best, LOSS: whole[best]},
            **{name: spread([run[name] for run in runs.values()])["mean"] for name in ("bytes_up", "bytes_down", "seconds")}}

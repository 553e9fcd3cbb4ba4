"""Loss and accuracy by round, or by simulated time where all have it: one line an entry with a band of ± sd, an SVG on white that
can be read on light and on dark pages.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora.spread import ACCURACY, LOSS
from flora.timing import LABELS, clocked, column

# Okabe and Ito's colours, which colour-blind readers can tell apart; after them again, dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STYLES = ("-", "--", ":", "-.")
PANELS = {LOSS: ("held-out loss", 1.0), ACCURACY: ("next-token accuracy, %", 100.0)}
COLUMNS = 3


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Writes the SVG; False where matplotlib is missing. entries: as spread.over_seeds gives them, with "name"."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    timed = clocked(entries)
    panels = {LOSS: PANELS[LOSS], LABELS: ("label accuracy, %", 100.0)} if timed and column(entries) == LABELS else PANELS
    look = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "flora"}
    with matplotlib.rc_context(look):
        lines = -(-len(entries) // COLUMNS)
        figure = Figure(figsize=(8.0, 3.3 + 0.2 * lines), layout="constrained")
        for panel, (name, (what, factor)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for number, entry in enumerate(entries):
                _line(panel, entry["by_round"].get(name, {}), factor, number, entry["name"], _seconds(entry) if timed else None)
            panel.set_title(what, fontsize=9, loc="left")
            panel.set_xlabel("simulated seconds" if timed else "rounds done")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        handles, names = panel.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=min(COLUMNS, len(names)), frameon=False)
        temporary = path.with_name(f".{path.name}.new")
        figure.savefig(temporary, format="svg", facecolor="white", metadata={"Date": None})
    temporary.replace(path)
    return True


def _seconds(entry: Mapping[str, Any]) -> dict[int, float]:
    """The end of every round, mean over the seeds that have it."""
    runs = [run["simulated"] for run in entry["runs"].values()]
    every = {number: [run[number] for run in runs if number in run] for number in set().union(*runs)}
    return {number: sum(values) / len(values) for number, values in every.items()}


def _line(panel: Any, by_round: Mapping[int, Mapping[str, Any]], factor: float, number: int, name: str,
          seconds: Mapping[int, float] | None) -> None:
    """The means over the seeds, and a band where a spread is known; a round that diverged, or that some seeds do not have, leaves a
    gap at the end of its line."""
    most = max((found["count"] for found in by_round.values()), default=0)
    points = [(done, found) for done, found in sorted(by_round.items()) if found["mean"] is not None and found["count"] == most]
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
    means = [factor * found["mean"] for _, found in points]
    half = [factor * (found["sd"] or 0.0) for _, found in points]
    rounds = [seconds[done] if seconds else done for done, _ in points]
    panel.plot(rounds, means, style, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name)
    if any(half):
        panel.fill_between(rounds, [m - h for m, h in zip(means, half, strict=True)],
                           [m + h for m, h in zip(means, half, strict=True)], color=colour, alpha=0.15, linewidth=0)

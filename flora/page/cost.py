"""Plots of what a run has cost: bytes by round and beside other ways to train, seconds by phase; and of the ranks that it used."""
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flora.page.facts import ENERGIES, kind, ranks_for
from flora.page.style import GREY, MARKS, ROWS, UNIFIED, colour, decades, faint, figure, line, mark, rounds_axis, short, text
from flora.page.units import duration, quantity

PHASES = 6                                                      # that have a colour
WAY = 27                                                        # letters of a way to train
FLOOR = 1e-16                                                   # of a scale of factors of ten

def traffic(series: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]) -> go.Figure:
    """Bytes of every round, a bar up and a hatched one down. series: {"up", "down"} -> by rounds done."""
    made = figure("rounds done", "bytes of all clients", layout={"barmode": "group"})
    made.update_yaxes(tickformat="~s", ticksuffix="B")
    for n, (name, both) in enumerate(series.items()):
        for way, found in both.items():
            made.add_bar(x=list(found), y=[one["mean"] for one in found.values()], name=f"{text(name)}, {way}",
                         marker={"color": colour(n) if way == "up" else faint(n, 0.3), "line": {"width": 1, "color": colour(n)},
                                 "pattern": {"shape": "" if way == "up" else "/", "fgcolor": colour(n), "size": 6}},
                         customdata=[quantity(one["mean"], "B") for one in found.values()],
                         hovertemplate="<b>%{fullData.name}</b><br>%{x} rounds done: %{customdata}<extra></extra>")
    rounds = [done for both in series.values() for found in both.values() for done in found]
    made.update_xaxes(dtick=max(1, math.ceil(max(rounds, default=0) / 10)), tick0=0)
    return made


def cumulative(series: Mapping[str, Mapping[int, float]], budgets: Sequence[float]) -> go.Figure:
    """Bytes up and down so far, against the budgets, in bytes."""
    made = figure("rounds done", "bytes so far, up and down")
    made.update_yaxes(tickformat="~s", ticksuffix="B", rangemode="tozero")
    for n, (name, found) in enumerate(series.items()):
        made.add_scatter(x=list(found), y=list(found.values()), mode="lines+markers", line=line(n), marker=mark(n), name=text(name),
                         customdata=[quantity(value, "B") for value in found.values()],
                         hovertemplate="<b>%{fullData.name}</b><br>%{x} rounds done: %{customdata}<extra></extra>")
    for budget in budgets:
        made.add_hline(y=budget, line={"width": 1.5, "color": GREY, "dash": "dash"}, annotation_position="top left",
                       annotation_text=f"budget {quantity(budget, 'B')}")
    rounds_axis(made, [done for found in series.values() for done in found])
    return made


def beside(totals: Mapping[str, tuple[float, int | None]]) -> go.Figure:
    """A point a way to train, on a scale of factors of ten: name -> (bytes, the number of its series; None: another way)."""
    made = figure("bytes up and down", "", 80 + (ROWS + 6) * len(totals))
    whole = max(total for total, _ in totals.values())
    at = list(range(len(totals)))
    for place, (name, (total, n)) in zip(at, totals.items(), strict=True):
        hue = GREY if n is None else colour(n)
        made.add_scatter(x=[total], y=[place], mode="markers+text", name=text(name), text=[f"  {quantity(total, 'B')}"],
                         textposition="middle right", cliponaxis=False,
                         marker={"color": hue, "size": 11, "symbol": "circle" if n is None else MARKS[n % len(MARKS)]},
                         customdata=[[quantity(total, "B"), total / whole]],
                         hovertemplate="<b>%{fullData.name}</b><br>%{customdata[0]}, %{customdata[1]:.3%} of the largest"
                                       "<extra></extra>")
    made.update_yaxes(tickvals=at, ticktext=[short(name, WAY) for name in totals], autorange="reversed")
    span = math.log10(whole / min(total for total, _ in totals.values()))
    decades(made, "xaxis", [total for total, _ in totals.values()], (0.15 + 0.05 * span, 0.15 + 0.25 * span))
    steps = (1,) if span > 1 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(16) for step in steps]
    made.update_xaxes(dtick=None, tickvals=ticks, ticktext=[quantity(tick, "B") for tick in ticks])
    return made


def phases(series: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Seconds of every phase of a run, a bar a series."""
    names = list(dict.fromkeys(phase for found in series.values() for phase in found))
    made = figure("seconds", "", max(300, 80 + max(ROWS, 20 * len(series)) * len(names)), {"barmode": "group", "bargap": 0.25})
    for n, (name, found) in enumerate(series.items()):
        made.add_bar(x=[found.get(phase, 0.0) for phase in names], y=list(range(len(names))), orientation="h", name=text(name),
                     marker={"color": colour(n)}, text=[duration(found.get(phase, 0.0)) for phase in names],
                     textposition="outside", textangle=0, cliponaxis=False,
                     customdata=[[text(phase), found.get(phase, 0.0) / (sum(found.values()) or 1.0)] for phase in names],
                     hovertemplate="<b>%{customdata[0]}</b><br>%{fullData.name}<br>%{x:,.2f} s, %{customdata[1]:.1%} of the run"
                                   "<extra></extra>")
    made.update_yaxes(tickvals=list(range(len(names))), ticktext=[short(name) for name in names], autorange="reversed")
    made.update_xaxes(range=[0, 1.3 * max((value for found in series.values() for value in found.values()), default=1.0)])
    return made


def by_phase(found: Mapping[int, Mapping[str, float]], order: Sequence[str], height: int) -> go.Figure:
    """Seconds of every round, its phases one on another: for one series, whose longest phases take the colours."""
    made = figure("rounds done", "seconds", height, {**UNIFIED, "barmode": "stack", "showlegend": True})
    main = order if len(order) <= PHASES else order[:PHASES - 1]
    for n, phase in enumerate([*main, *([None] if len(main) < len(order) else [])]):
        sums = [one.get(phase, 0.0) if phase is not None else sum(v for k, v in one.items() if k not in main)
                for one in found.values()]
        made.add_bar(x=list(found), y=sums, name="other" if phase is None else text(phase),
                     marker={"color": GREY if phase is None else colour(n)}, hovertemplate="%{y:,.2f} s")
    rounds_axis(made, list(found))
    made.update_xaxes(range=[min(found) - 0.6, max(found) + 0.6])
    return made


def round_seconds(series: Mapping[str, Mapping[int, float]], height: int) -> go.Figure:
    """Seconds of every round, a line a series."""
    made = figure("rounds done", "seconds", height, UNIFIED)
    made.update_yaxes(rangemode="tozero")
    for n, (name, found) in enumerate(series.items()):
        made.add_scatter(x=list(found), y=list(found.values()), mode="lines+markers", line=line(n), marker=mark(n), name=text(name),
                         hovertemplate="%{y:,.1f} s")
    rounds_axis(made, [done for found in series.values() for done in found])
    return made


def falling(series: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """σ_i / σ_1 of the aggregate's layers by i: the median of all layers a series, and a band from the least to the largest."""
    made, shown = figure("<i>i</i>", "σ<sub>i</sub> / σ<sub>1</sub>", layout=UNIFIED), []
    for n, (name, layers) in enumerate(series.items()):
        ratios = [[max(s / sigma[0], FLOOR) for s in sigma] for sigma in layers.values() if sigma and sigma[0] > 0]
        widths = range(max(map(len, ratios), default=0))
        columns = [[one[i] for one in ratios if i < len(one)] for i in widths]
        shown += ratios
        xs, low, high = [i + 1 for i in widths], [min(c) for c in columns], [max(c) for c in columns]
        made.add_scatter(x=[*xs, *reversed(xs)], y=[*high, *reversed(low)], fill="toself", fillcolor=faint(n), line={"width": 0},
                         mode="lines", hoverinfo="skip")
        made.add_scatter(x=xs, y=[statistics.median(c) for c in columns], mode="lines", line=line(n), name=text(name),
                         hovertemplate="%{y:.2g}")
    made.update_xaxes(unifiedhovertitle={"text": "singular value %{x}"}, rangemode="tozero")
    lowest = min((min(one) for one in shown), default=1.0)
    decades(made, "yaxis", [lowest, 1.0])
    made.update_yaxes(tickformat=".0e")
    return made


def used(series: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Ranks that hold 90 and 99 % of Σ σ² by kind of layer: medians over the layers of that kind, and the rank of the stack."""
    kinds = list(dict.fromkeys(kind(layer) for layers in series.values() for layer in layers))
    made = figure("ranks", "", max(300, 80 + max(ROWS + 4, 22 * len(series)) * len(kinds)))
    for n, (name, layers) in enumerate(series.items()):
        shift = 0.0 if len(series) == 1 else 0.6 * (n / (len(series) - 1) - 0.5)
        rows = [(at, [sigma for layer, sigma in layers.items() if kind(layer) == one]) for at, one in enumerate(kinds)]
        rows = [(at, mine) for at, mine in rows if mine]
        points = [[statistics.median(ranks_for(sigma, share) for sigma in mine) for share in ENERGIES]
                  + [statistics.median(map(len, mine))] for _, mine in rows]
        ys = [at + shift for at, _ in rows]
        made.add_scatter(x=[x for one in points for x in (0, one[-1], None)], y=[y for y in ys for y in (y, y, None)], mode="lines",
                         line={"color": faint(n, 0.35), "width": 5}, hoverinfo="skip")
        for i, what in enumerate([*(f"{share:.0%} of Σ σ²" for share in ENERGIES), "rank of the aggregate"]):
            symbol = ("circle", "circle-open", "line-ns-open")[i]
            made.add_scatter(x=[one[i] for one in points], y=ys, mode="markers", name=text(name),
                             marker={"color": colour(n), "size": 10, "symbol": symbol, "line": {"width": 2, "color": colour(n)}},
                             customdata=[text(kinds[at]) for at, _ in rows],
                             hovertemplate=f"<b>%{{customdata}}</b><br>%{{fullData.name}}<br>{what}: %{{x:g}} ranks<extra></extra>")
    made.update_yaxes(tickvals=list(range(len(kinds))), ticktext=[short(one) for one in kinds], autorange="reversed")
    made.update_xaxes(rangemode="tozero")
    return made


def errors(series: Mapping[str, Mapping[int, float]]) -> go.Figure:
    """The relative error of the aggregate by round, a line a series; an error of 0 is drawn at the bottom."""
    made = figure("round", "relative error", layout=UNIFIED)
    for n, (name, found) in enumerate(series.items()):
        made.add_scatter(x=list(found), y=[max(error, FLOOR) for error in found.values()], mode="lines+markers", line=line(n),
                         marker=mark(n), name=text(name), hovertemplate="%{y:.1e}")
    rounds_axis(made, [done for found in series.values() for done in found])
    decades(made, "yaxis", [max(error, FLOOR) for found in series.values() for error in found.values()])
    made.update_yaxes(tickformat=".0e")
    return made

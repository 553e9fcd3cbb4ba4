"""Plots of what a run has reached: loss and accuracy by round, every client before and after, and how labels lie over clients."""
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flora.page.facts import Member
from flora.page.style import GREY, MARKS, ROWS, UNIFIED, colour, decades, faint, figure, line, mark, rounds_axis, short, text

LABELS = 6                                                      # that have a colour
APART = 1.08                                                    # factor between the marks of two series at one rank


def lines(series: Mapping[str, Mapping[int, Mapping[str, Any]]], y: str, form: str = ".4f") -> go.Figure:
    """A line a series of means by rounds done, with a band of ± sd where there is one. form: of d3, for tooltips."""
    made = figure("rounds done", y, layout=UNIFIED)
    made.update_yaxes(tickformat="~%" if form.endswith("%") else "", rangemode="nonnegative")
    for n, (name, found) in enumerate(series.items()):
        known = {done: one for done, one in found.items() if one["mean"] is not None}
        xs, means, half = list(known), [one["mean"] for one in known.values()], [one["sd"] or 0.0 for one in known.values()]
        if any(half):
            _band(made, xs, [m - h for m, h in zip(means, half, strict=True)], [m + h for m, h in zip(means, half, strict=True)], n)
        made.add_scatter(x=xs, y=means, mode="lines+markers", line=line(n), marker=mark(n), name=text(name), customdata=half,
                         hovertemplate=f"%{{y:{form}}}" + (f" ± %{{customdata:{form}}}" if any(half) else ""))
    rounds_axis(made, [done for found in series.values() for done in found])
    return made


def _band(made: go.Figure, xs: Sequence[int], low: Sequence[float], high: Sequence[float], number: int) -> None:
    made.add_scatter(x=[*xs, *reversed(xs)], y=[*high, *reversed(low)], fill="toself", fillcolor=faint(number), line={"width": 0},
                     mode="lines", hoverinfo="skip")


def client_spread(series: Mapping[str, Mapping[int, tuple[float, ...]]], y: str) -> go.Figure:
    """Boxes of the clients by round: minimum, quartiles, median and maximum, a box a series side by side."""
    made = figure("rounds done", y, layout={"boxmode": "group"})
    for n, (name, found) in enumerate(series.items()):
        low, first, middle, third, high = (list(column) for column in zip(*found.values(), strict=True))
        made.add_box(x=list(found), lowerfence=low, q1=first, median=middle, q3=third, upperfence=high, name=text(name),
                     line={"color": colour(n), "width": 1.5}, fillcolor=faint(n, 0.25), hoverinfo="y", whiskerwidth=0.6)
    rounds_axis(made, [done for found in series.values() for done in found])
    made.update_xaxes(range=[min(min(f) for f in series.values()) - 0.6, max(max(f) for f in series.values()) + 0.6])
    return made


def before_after(series: Mapping[str, Sequence[Member]]) -> go.Figure:
    """A line a client and series from its first to its last loss, open to full."""
    names = list(dict.fromkeys(one.name for own in series.values() for one in own))
    made = figure("nats a token", "", max(300, 80 + max(ROWS, 14 * len(series)) * len(names)))
    for n, (name, own) in enumerate(series.items()):
        shift = 0.0 if len(series) == 1 else 0.6 * (n / (len(series) - 1) - 0.5)
        known = [one for one in own if one.change is not None]
        at = [names.index(one.name) + shift for one in known]
        made.add_scatter(x=[x for one in known for x in (*one.loss, None)], y=[y for place in at for y in (place, place, None)],
                         mode="lines", line={**line(n), "width": 2}, hoverinfo="skip")
        for end, what in ((0, "before"), (1, "after")):
            symbol = MARKS[n % len(MARKS)] + ("-open" if end == 0 else "")
            made.add_scatter(x=[one.loss[end] for one in known], y=at, mode="markers", name=text(name),
                             marker={**mark(n, 9), "symbol": symbol, "line": {"width": 2, "color": colour(n)}},
                             customdata=[[text(one.name), one.rank, one.rows, one.change] for one in known],
                             hovertemplate=f"<b>%{{customdata[0]}}</b><br>%{{fullData.name}}<br>{what} %{{x:.4f}}<br>change "
                                           f"%{{customdata[3]:+.4f}}"
                                           "<br>rank %{customdata[1]}, %{customdata[2]:,} rows<extra></extra>")
    made.update_yaxes(tickvals=list(range(len(names))), ticktext=[short(name) for name in names], autorange="reversed")
    return made


def by_rank(series: Mapping[str, Sequence[Member]]) -> go.Figure:
    """What every client has gained, by its rank; a circle's area is its number of rows."""
    made = figure("rank", "change, nats a token", 300)
    most = max((one.rows or 0 for own in series.values() for one in own), default=0) or 1
    ranks = sorted({int(one.rank) for own in series.values() for one in own if one.rank})
    for n, (name, own) in enumerate(series.items()):
        known = [one for one in own if one.change is not None and one.rank]
        beside = APART ** (n - (len(series) - 1) / 2)
        made.add_scatter(x=[one.rank * beside for one in known], y=[one.change for one in known], mode="markers", name=text(name),
                         marker={"color": faint(n, 0.45), "symbol": MARKS[n % len(MARKS)],
                                 "line": {"width": 1.5, "color": colour(n)},
                                 "sizemode": "area", "sizeref": 2 * most / 22**2, "sizemin": 4,
                                 "size": [one.rows or 0 for one in known]},
                         customdata=[[text(one.name), one.rows, one.rank] for one in known],
                         hovertemplate="<b>%{customdata[0]}</b><br>%{fullData.name}<br>rank %{customdata[2]}<br>change %{y:+.4f}"
                                       "<br>%{customdata[1]:,} rows<extra></extra>")
    made.update_xaxes(type="log", tickvals=ranks, ticktext=[str(rank) for rank in ranks])
    if ranks:
        decades(made, "xaxis", ranks, (0.2, 0.2))
    made.add_hline(y=0, line={"width": 1, "color": GREY, "dash": "dot"})
    return made


def labels(found: Mapping[str, Mapping[Any, float]], most_clients: int) -> go.Figure:
    """Shares of every label by client (the first ones) and of all together; labels beyond the colours are one, grey."""
    sums: dict[Any, float] = {}
    for own in found.values():
        for key, count in own.items():
            sums[key] = sums.get(key, 0.0) + count
    keys = sorted(sums, key=lambda key: (-sums[key], str(key)))
    kept = keys if len(keys) <= LABELS else keys[:LABELS - 1]
    parts = {**dict(list(found.items())[:most_clients]), "all clients": sums}
    made = figure("share of the client's rows", "", 110 + ROWS * len(parts),
                  {"barmode": "stack", "showlegend": True, "bargap": 0.2})
    for n, key in enumerate([*kept, *([None] if len(kept) < len(keys) else [])]):
        counts = [own.get(key, 0.0) if key is not None else sum(c for k, c in own.items() if k not in kept)
                  for own in parts.values()]
        name = "other" if key is None else key
        made.add_bar(x=[c / (sum(own.values()) or 1.0) for c, own in zip(counts, parts.values(), strict=True)],
                     y=list(range(len(parts))), orientation="h", name=short(name),
                     marker={"color": GREY if key is None else colour(n), "line": {"width": 0}},
                     customdata=[[text(who), count, text(name)] for who, count in zip(parts, counts, strict=True)],
                     hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[2]}: %{customdata[1]:,} rows, %{x:.1%}<extra></extra>")
    made.update_yaxes(tickvals=list(range(len(parts))), ticktext=[short(name) for name in parts], autorange="reversed")
    made.update_xaxes(tickformat=".0%", range=[0, 1], tickvals=[0, 0.25, 0.5, 0.75, 1])
    return made

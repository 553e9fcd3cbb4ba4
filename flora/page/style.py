"""What all plots share: colours, one a series, those of flora.plots (page.js puts lighter ones in their place on a dark page),
axes, and `text`, through which every text that was read from a file goes, since plotly takes some markup in labels and tooltips.
"""
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flora.plots import COLOURS

DASHES = ("solid", "dash", "dot", "dashdot")
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
UNIFIED = {"hovermode": "x unified"}                            # one tooltip for all series at a place
GREY = "#888888"                                                # what is no series, on light and on dark
LONG = 18                                                       # letters of a name beside an axis; tooltips have all
ROWS = 26                                                       # pixels of a bar or a client


def text(value: object) -> str:
    """A text that plotly shows letter by letter, on one line."""
    return html.escape(" ".join(str(value).split()), quote=False)


def short(value: object, most: int = LONG) -> str:
    plain = " ".join(str(value).split())
    return text(plain if len(plain) <= most else plain[:most - 1] + "…")


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def faint(number: int, alpha: float = 0.15) -> str:
    r, g, b = (int(colour(number)[i:i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def line(number: int) -> dict[str, Any]:
    return {"color": colour(number), "width": 2, "dash": DASHES[number // len(COLOURS) % len(DASHES)]}


def mark(number: int, size: int = 8) -> dict[str, Any]:
    return {"color": colour(number), "symbol": MARKS[number % len(MARKS)], "size": size}


def figure(x: str, y: str, height: int = 300, layout: Mapping[str, Any] | None = None) -> go.Figure:
    """An empty figure with its axes named and more of its layout; page.js adds what depends on light or dark."""
    made = go.Figure(layout={"template": "none", "height": height, "showlegend": False, "dragmode": False, "hovermode": "closest",
                             "margin": {"l": 56, "r": 24, "t": 8, "b": 44}, "bargap": 0.3,
                             "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left",
                                        "traceorder": "normal"}} | dict(layout or {}))
    made.update_xaxes(title={"text": x, "standoff": 8}, zeroline=False, automargin=True)
    made.update_yaxes(title={"text": y, "standoff": 8}, zeroline=False, automargin=True)
    return made


def rounds_axis(made: go.Figure, numbers: Sequence[int]) -> None:
    """Whole rounds on the axis, a dozen labels at most."""
    last = max(numbers, default=0)
    made.update_xaxes(dtick=max(1, math.ceil(last / 10)), tick0=0, range=[min(numbers, default=0) - 0.25, last + 0.25],
                      unifiedhovertitle={"text": "rounds done: %{x}"})


def decades(made: go.Figure, axis: str, values: Sequence[float], room: tuple[float, float] = (0.0, 0.0)) -> None:
    """A scale of whole factors of ten around values above 0, with room (in factors of ten) below and above; seven lines at
    most."""
    low, high = math.log10(min(values)) - room[0], math.log10(max(values)) + room[1]
    low, high = (low, high) if any(room) else (math.floor(low), max(math.ceil(high), math.floor(low) + 1))
    given = {} if made.layout[axis].tickvals else {"dtick": max(1, math.ceil((high - low) / 7))}
    made.update_layout({axis: {"type": "log", "range": [low, high], **given}})

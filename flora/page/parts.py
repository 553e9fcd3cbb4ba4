"""What a page is made of, before it is HTML: sections of plots, tables and notes. Every text is plain; render.py escapes it."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flora.page.units import NOTHING

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Cell:
    """A text of a table, and what its column is sorted by (None: the text; a dash goes last)."""
    text: str
    value: float | None = None
    hue: int | None = None                                      # the number of a series, whose colour stands before the text


@dataclass(frozen=True)
class Table:
    """columns: names, those of numbers with a trailing # (set to the right). folded: behind a line that opens it."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure with its title, and a caption that says what its marks are. wide: over the whole page."""
    title: str
    caption: str
    figure: "go.Figure"
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """lead: what this part says and where its numbers come from; notes: what it comes to, or why it is not there and how to get it;
    legend: whether colours stand for series here; tiles: a few numbers, large."""
    key: str
    title: str
    lead: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    legend: bool = True
    tiles: Mapping[str, str] = field(default_factory=dict)


def word(value: Any, hue: int | None = None) -> Cell:
    """A text of a table; lists with commas."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return Cell(NOTHING if value is None else str(value), hue=hue)


def count(value: float | None, said: str) -> Cell:
    """A number of a table, as it is said."""
    return Cell(said, value)


def widths(plots: Sequence[Plot]) -> list[bool]:
    """Which plots take the whole width of a page of two columns: those that are wide, and one that would stand alone
    in its line."""
    wide: list[bool] = []
    half = False                                                # whether the line at hand has one plot so far
    for plot in plots:
        if plot.wide and half:
            wide[-1] = True
        wide.append(plot.wide)
        half = not plot.wide and not half
    if half:
        wide[-1] = True
    return wide

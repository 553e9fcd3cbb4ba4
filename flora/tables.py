"""The tables of a comparison, made once and shown twice: by rich in the terminal, and as Markdown."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from flora.spread import ACCURACY, LOSS, finite, spread

Entry = Mapping[str, Any]
NOTHING = "–"
WORDS = ("entry", "of", "which is", "best")                     # columns of words; the first wraps down to NAME letters
NAME = 12


@dataclass(frozen=True)
class Page:
    """A table: title, columns, rows of text, and a note below."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> Table:
        """For the terminal; words to the left, numbers to the right. Where it is narrow, names are wrapped, and no number is."""
        table = Table(title=escape(self.title), title_justify="left", box=SIMPLE, caption=self.note or None, caption_justify="left",
                      padding=(0, 1, 0, 0))
        for i, name in enumerate(self.columns):
            widest = max((len(row[i]) for row in self.rows), default=0)
            table.add_column(escape(name), justify="left" if name in WORDS else "right", overflow="fold",
                             min_width=min(widest, NAME) if name == WORDS[0] else widest)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def plus_minus(found: Mapping[str, Any] | None, form: str = ".4f", sign: str = "") -> str:
    """mean ± sd; the mean alone where there is no spread."""
    if not found or not finite(found["mean"]):
        return NOTHING
    mean = format(found["mean"], sign + form)
    return mean if found["sd"] is None else f"{mean} ± {format(found['sd'], form)}"


def percent(found: Mapping[str, Any] | None, sign: str = "") -> str:
    """The same in hundredths."""
    return plus_minus(found, ".1%", sign).replace("%", "")


def _word(column: str) -> str:
    return column.removeprefix("eval_").replace("_", " ")


def final(entries: Sequence[Entry]) -> Page:
    """Each entry after its last round."""
    known = (LOSS, ACCURACY)
    more = list(dict.fromkeys(name for entry in entries for name in entry["final"] if name not in known))
    shares = {name for name in more if "accuracy" in name}
    words = [_word(name) + (", %" if name in shares else "") for name in more]
    rows = []
    for entry in entries:
        found, best = entry["final"], entry["best"]
        rows.append([entry["name"], plus_minus(found[LOSS]), percent(found.get(ACCURACY)),
                     *((percent if name in shares else plus_minus)(found.get(name)) for name in more),
                     f"{best[LOSS]:.4f} ({best['rounds_done']})" if best else NOTHING,
                     f"{entry['bytes_up'] / 1e6:.1f}", f"{entry['bytes_down'] / 1e6:.1f}", f"{entry['seconds']:.0f}"])
    seeds = entries[0]["seeds"]
    of = f"mean ± sd over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    return Page(f"after the last round, held-out completions: {of}",
                ["entry", "loss", "accuracy, %", *words, "best (after)", "MB up", "MB down", "s"], rows)


def by_round(entries: Sequence[Entry]) -> Page:
    """Loss by round: means over the seeds that have the round."""
    counts = sorted({number for entry in entries for number in entry["by_round"][LOSS]})

    def cell(entry: Entry, number: int) -> str:
        found = entry["by_round"][LOSS].get(number)
        if found is None or found["mean"] is None:
            return NOTHING
        return f"{found['mean']:.4f}" + (f" ({found['count']})" if found["count"] < len(entry["seeds"]) else "")

    fewer = any(found["count"] < len(entry["seeds"]) for entry in entries for found in entry["by_round"][LOSS].values())
    return Page("loss by rounds done, mean over seeds", ["rounds", *(entry["name"] for entry in entries)],
                [[str(number), *(cell(entry, number) for entry in entries)] for number in counts],
                "In brackets: of so many seeds." if fewer else "")


def against(entries: Sequence[Entry]) -> Page:
    """Every entry less the first, paired by seed."""
    rows = []
    for entry in entries[1:]:
        for name, found in entry["against_first"].items():
            share = "accuracy" in name
            rows.append([entry["name"], _word(name) + (", points" if share else ""),
                         (percent if share else plus_minus)(found, sign="+"), found["says"]])
    return Page(f"less {entries[0]['name']}, paired by seed: mean ± sd of the differences",
                ["entry", "of", "difference", "which is"], rows,
                "Within the spread: |mean| <= t · sd / √n, Student's t at 95 %, two-sided.")


def clock(entries: Sequence[Entry]) -> list[Page]:
    """The simulated time of entries that have "clock" (timing.by_clock)."""
    names, first = list(entries[0]["clock"]["reached"]), entries[0]["name"]
    words = [_word(name) + (", %" if "accuracy" in name else "") for name in names]
    at = spread(list(entries[0]["clock"]["at"].values()))

    def cells(name: str, found: Mapping[str, Any]) -> list[str]:
        show = percent if "accuracy" in name else plus_minus
        return [show(found["reached"][name]), NOTHING if found is entries[0]["clock"] else found["less"][name]["says"]]

    def until(name: str, found: Mapping[str, Any]) -> list[str]:
        seconds, count = found["seconds"][name], len(found["at"])
        few = "" if seconds["count"] == count else f" ({seconds['count']} of {count} seeds)"
        return [plus_minus(seconds, ".0f") + few, plus_minus(found["times"][name], ".2f")]

    equal = [[entry["name"], *(cell for name in names for cell in cells(name, entry["clock"]))] for entry in entries]
    times = [[entry["name"], *(cell for name in names for cell in until(name, entry["clock"]))] for entry in entries]
    return [Page(f"at equal simulated time: after {plus_minus(at, '.0f')} s, when the quickest is done",
                 ["entry", *(cell for word in words for cell in (word, f"than {first}"))], equal),
            Page(f"simulated seconds to what {first} ends with",
                 ["entry", *(cell for word in words for cell in (f"to its {word.removesuffix(', %')}", "times faster"))], times,
                 f"{NOTHING}: never there. Times faster: {first}'s seconds over the entry's, of the seeds that get there.")]


def grid(choices: Sequence[Mapping[str, Any]]) -> Page:
    """The final loss of every entry at every learning rate, and which is the best."""
    rates = sorted({rate for choice in choices for rate in choice["losses"]})
    rows = [[choice["entry"], *(plus_minus(choice["losses"][rate]) for rate in rates),
             NOTHING if choice["best"] is None else f"{choice['best']:g}" + (", an edge of the grid" if choice["edge"] else "")]
            for choice in choices]
    edges = any(choice["edge"] for choice in choices)
    return Page("final loss by learning rate", ["entry", *(f"{rate:g}" for rate in rates), "best"], rows,
                "A best rate at an edge of the grid: a better one may lie beyond." if edges else "")

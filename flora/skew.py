"""`flora partition`: how a config's labels lie over its clients and near-IID groups of them: tables, and stacked bars as an SVG.

The rows are those that the run would train on: the same data, partition, held-out split and limits, without the model. Rows without
a label are shown by hashed bins of their tokens (grouping.token_histograms), which takes the config's tokenizer.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flora.config import RunConfig
from flora.data import load_rows, load_tokenizer, tokenize_rows
from flora.engines.prepare import dealt
from flora.errors import ConfigError, needs
from flora.grouping import Groups, Histograms, divergence, histograms, near_iid, report, token_histograms, total
from flora.plots import COLOURS

BINS = 16                                                       # of tokens, where there are no labels
HATCHES = ("", "///")                                           # after the colours, the colours again, hatched
OTHER = "other"
MAIN = 3                                                        # labels of a row of a table
LOOK = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "flora"}


@dataclass(frozen=True)
class Skew:
    """of: what the bins are; rows: training rows by client; found: their histograms; groups: none where none were asked for;
    report: the divergences of these groups and of those that they are compared with."""
    of: str
    rows: Mapping[str, int]
    found: Histograms
    groups: Groups
    report: Mapping[str, Mapping[str, float]]


def label_skew(config: RunConfig, num_groups: int | None = None, label: str | None = None) -> Skew:
    """The histograms of the clients of this config, and num_groups near-IID groups of them, if that is given.

    label: a column (None: the partition's label, else `label` where every client has such rows, else hashed tokens).
    Raises DataError, FetchError, ConfigError.
    """
    rows = load_rows(config.dataset)
    own = {name: [rows[i] for i in indices] for name, indices in dealt(config, rows).train.items()}
    label = label or config.partition.label
    if label is None and all(any(row.get("label") is not None for row in part) for part in own.values()):
        label = "label"
    if label is not None:
        found: Histograms = histograms(own, label)
    else:
        tokenizer = load_tokenizer(config.model_name_or_path)
        found = token_histograms({name: [row["input_ids"] for row in tokenize_rows(tokenizer, part, config.max_length,
                                                                                   config.chat_template)]
                                  for name, part in own.items()}, BINS, config.seed)
    groups = [] if num_groups is None else near_iid(found, num_groups, seed=config.seed)
    said = report(found, groups, seed=config.seed) if groups else {}
    of = label if label is not None else "hashed bins of tokens (no labels)"
    return Skew(of, {name: len(part) for name, part in own.items()}, found, groups, said)


def show(seen: Skew) -> None:
    """Prints clients, groups and what the grouping is worth."""
    console = Console()
    everyone = total(seen.found, seen.found)
    of_client = {name: f"group-{g}" for g, group in enumerate(seen.groups) for name in group}
    clients = Table("client", *(["group"] if seen.groups else []), box=SIMPLE, title=f"clients: {escape(seen.of)}",
                    title_justify="left")
    _columns(clients)
    for name in seen.found:
        clients.add_row(escape(name), *([of_client[name]] if seen.groups else []), str(seen.rows[name]),
                        f"{divergence(seen.found[name], everyone):.5f}", _main(seen.found[name]))
    clients.add_row("all", *([""] if seen.groups else []), str(sum(seen.rows.values())), "", _main(everyone))
    console.print(clients)
    if not seen.groups:
        return
    groups = Table("group", box=SIMPLE, title="groups, near-IID", title_justify="left")
    groups.add_column("clients", justify="right")
    _columns(groups)
    for g, group in enumerate(seen.groups):
        counts = total(seen.found, group)
        groups.add_row(f"group-{g}", str(len(group)), str(sum(seen.rows[name] for name in group)),
                       f"{divergence(counts, everyone):.5f}", _main(counts))
    console.print(groups)
    against = Table("grouping", box=SIMPLE, title="divergence of the groups from all clients", title_justify="left",
                    caption="JS in base 2 (0 to 1) and KL in bits, means over the groups; L1 from 0 to 2; worst: the largest JS.",
                    caption_justify="left")
    for name in ("JS", "KL", "L1", "worst"):
        against.add_column(name, justify="right")
    for name, values in seen.report.items():
        against.add_row(name, *(f"{values[key]:.5f}" for key in ("js", "kl", "l1", "worst")))
    console.print(against)


def _columns(table: Table) -> None:
    for name in ("rows", "JS"):
        table.add_column(name, justify="right")
    table.add_column("most frequent")


def _main(counts: Mapping[Any, float]) -> str:
    """The largest bins and their shares."""
    whole, order = sum(counts.values()), sorted(counts, key=lambda key: (-counts[key], str(key)))
    shares = [f"{key} {counts[key] / whole:.0%}" for key in order[:MAIN] if counts[key]]
    return escape(", ".join(shares) + (", …" if sum(count > 0 for count in counts.values()) > MAIN else ""))


def draw(seen: Skew, path: Path) -> None:
    """Writes the SVG: a bar a client, in the order of the groups, and a bar a group; both beside all. Raises ConfigError where
    matplotlib is missing."""
    with needs("matplotlib", "plot"):
        import matplotlib
        from matplotlib.figure import Figure
    everyone = total(seen.found, seen.found)
    bars = {name: seen.found[name] for name in ([n for group in seen.groups for n in group] or seen.found)}
    panels = [(f"{'clients, by group' if seen.groups else 'clients'}: share of {seen.of}", bars)]
    if seen.groups:
        panels.append(("near-IID groups", {str(g): total(seen.found, group) for g, group in enumerate(seen.groups)}))
    keys = sorted(everyone, key=lambda key: (-everyone[key], str(key)))
    most = len(COLOURS) * len(HATCHES)
    shown = keys if len(keys) <= most else keys[:most - 1]
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), width_ratios=[3, 1][:len(panels)], squeeze=False)[0]
        for panel, (what, parts) in zip(axes, panels, strict=True):
            _stack(panel, {**parts, "all": everyone}, shown, len(shown) < len(keys))
            panel.set_title(what, fontsize=9, loc="left")
        edges = [sum(map(len, seen.groups[:g])) - 0.5 for g in range(1, len(seen.groups))]
        axes[0].vlines(edges, -0.02, 1.02, color="#222222", linewidth=0.8, clip_on=False)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=min(7, len(names)), frameon=False)
        temporary = path.with_name(f".{path.name}.new")
        try:
            figure.savefig(temporary, format="svg", facecolor="white", metadata={"Date": None})
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"--plot: expected a file that can be written; got {path} ({error.strerror})") from error


def _stack(panel: Any, parts: Mapping[str, Mapping[Any, float]], shown: Sequence[Any], rest: bool) -> None:
    """Bars of shares; the last, all, stands apart. Bins beyond the colours are one, grey."""
    at = [*range(len(parts) - 1), len(parts) - 1 + max(0.5, 0.02 * len(parts))]
    sums = [sum(part.values()) for part in parts.values()]
    bottom = [0.0] * len(at)
    for number, key in enumerate(shown):
        height = [part.get(key, 0.0) / whole for part, whole in zip(parts.values(), sums, strict=True)]
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number // len(COLOURS)]
        panel.bar(at, height, 1.0 if len(at) > 20 else 0.85, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.2,
                  label=str(key))
        bottom = [low + more for low, more in zip(bottom, height, strict=True)]
    if rest:
        panel.bar(at, [1 - low for low in bottom], 1.0 if len(at) > 20 else 0.85, bottom, color="#DDDDDD", label=OTHER)
    few = len(at) <= 12
    long = few and sum(map(len, parts)) > 40
    panel.set_xticks(at if few else at[-1:], list(parts) if few else ["all"], rotation=45 if long else 0)
    panel.set_xlim(-0.8, at[-1] + 0.8)
    panel.set_ylim(0, 1)
    panel.spines[["top", "right"]].set_visible(False)

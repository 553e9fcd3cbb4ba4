"""Draws docs/cohort.svg: tokens/s against the number of clients, a line a variant, a panel a number of sequences.

    python -m benchmarks.plot [benchmarks/results/<device>/cohort.json] [--as-run] [--out docs/cohort.svg]

Needs matplotlib. Colours are Okabe and Ito's, which colour-blind readers can tell apart; every line is named at its end.
"""
import argparse
import json
from pathlib import Path

from benchmarks.measure import RESULTS
from flora.speed import device_name

# Variant: colour, and line style: whole for flora, dashed for its peers, dotted for the limit.
STYLES = {"flora, one batch": ("#0072B2", "-"), "flora, one by one": ("#56B4E9", "-"), "PEFT loop": ("#D55E00", "--"),
          "PEFT loop, bf16 base": ("#CC79A7", "--"), "PEFT, HF Trainer": ("#E69F00", "--"), "bare products": ("#555555", ":")}
WORDS = {"bare products": "bare matrix products", "PEFT, HF Trainer": "HF Trainer"}


def series(rows: list[dict]) -> dict[int, dict[str, dict[int, float]]]:
    """{sequences: {variant: {clients: tokens/s}}} of the rows measured with the default options; of two the later counts. Without a
    single point: a number of sequences that was measured for one number of clients."""
    usual = {"model": "smollm2-135m", "ranks": [16], "dtype": "float32", "length": 128, "tokens_per_pass": None}
    out: dict[int, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["variant"] in STYLES and usual.items() <= row.items():
            out.setdefault(row["sequences"], {}).setdefault(row["variant"], {})[row["clients"]] = row["tokens_per_second"]
    several = {sequences: lines for sequences, lines in out.items() if len({n for line in lines.values() for n in line}) > 1}
    return dict(sorted((several or out).items()))


def spread(wanted: list[float], gap: float) -> list[float]:
    """Heights (ascending) as near to those wanted as they can be with a gap between neighbours: labels must not overlap."""
    blocks: list[tuple[float, int]] = []                                # (lowest height, how many)
    for height in wanted:
        blocks.append((height, 1))
        while len(blocks) > 1 and blocks[-2][0] + gap * blocks[-2][1] > blocks[-1][0]:
            (low, few), (high, more) = blocks[-2:]
            middle = ((low + gap * (few - 1) / 2) * few + (high + gap * (more - 1) / 2) * more) / (few + more)
            blocks[-2:] = [(middle - gap * (few + more - 1) / 2, few + more)]
    return [low + gap * i for low, count in blocks for i in range(count)]


def draw(data: dict[int, dict[str, dict[int, float]]], where: str, out: Path) -> None:
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot
    pyplot.rcParams |= {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "flora"}
    figure, panels = pyplot.subplots(1, len(data), figsize=(0.6 + 3.6 * len(data), 3.4), sharey=True, squeeze=False)
    top = 1.08 * max(rate for lines in data.values() for line in lines.values() for rate in line.values())
    for panel, (sequences, lines) in zip(panels[0], data.items(), strict=True):
        counts = sorted({count for line in lines.values() for count in line})
        for variant, line in lines.items():
            colour, style = STYLES[variant]
            panel.plot(sorted(line), [line[count] for count in sorted(line)], style, color=colour, marker="o", markersize=3.5,
                       linewidth=2 if variant == "flora, one batch" else 1.4)
        ends = sorted((line[max(line)], variant) for variant, line in lines.items())
        for height, (_, variant) in zip(spread([rate for rate, _ in ends], 0.06 * top), ends, strict=True):
            panel.annotate(WORDS.get(variant, variant), (1.02, height / top), xycoords="axes fraction", va="center", fontsize=8,
                           color=STYLES[variant][0], annotation_clip=False)
        panel.set_title(f"{sequences} sequence{'s' * (sequences > 1)} a client", fontsize=9, loc="left")
        panel.set_xscale("log")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        panel.set(xlabel="clients", ylim=(0, top))
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens / s")
    figure.suptitle(where, x=0.01, ha="left", fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(out, facecolor="white", metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="default: of this device")
    parser.add_argument("--as-run", action="store_true", help="of cohort_as_run.json, where no file is given")
    parser.add_argument("--out", type=Path, default=Path("docs/cohort.svg"))
    options = parser.parse_args()
    path = options.results or RESULTS / device_name() / ("cohort_as_run.json" if options.as_run else "cohort.json")
    if not path.exists():
        parser.error(f"{path} does not exist; python -m benchmarks.bench_cohort --full writes it")
    rows = json.loads(path.read_text())["rows"]
    if not (data := series(rows)):
        parser.error(f"{path} has no rows of the default options; python -m benchmarks.bench_cohort --full writes them")
    allocators = {row["allocator"] for row in rows}
    how = f"{allocators.pop()} for all" if len(allocators) == 1 else "as a user runs each"
    about = f"{rows[0]['model']}, fp32, rank 16, rows of {rows[0]['length']} tokens; {path.parent.name}; C allocator: {how}"
    draw(data, about, options.out)


if __name__ == "__main__":
    main()

"""The Markdown of a folder of results: how its parts ended, the targets of a GPU beside what was measured, and every table.

    python -m benchmarks.summary [benchmarks/results/<card>/<date>]
"""
import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_lora_linear import BOTH, KINDS
from benchmarks.bench_lora_linear import title as linears
from benchmarks.bench_merge import ALONE, BLOCKS
from benchmarks.bench_merge import title as merges
from benchmarks.clients import Case
from benchmarks.measure import folder
from flora.speed import COLUMNS

Row = dict[str, Any]


TARGET_HEAD = ("| target | | measured | |", "| --- | ---: | ---: | --- |")


class Target(NamedTuple):
    """What is to be reached: at most or at least a number, measured by a function of a file's rows (None: not measured)."""
    what: str
    file: str
    bound: float
    least: bool
    measured: Callable[[Sequence[Row]], float | None]

    def line(self, rows: Sequence[Row]) -> str:
        value = self.measured(rows)
        sign, number = "≥" if self.least else "≤", "–" if value is None else f"{value:.3g}"
        if value is None:
            said = "not measured"
        else:
            said = "reached" if (value >= self.bound if self.least else value <= self.bound) else "**not reached**"
        return f"| {self.what} | {sign} {self.bound:g} | {number} | {said} |"


def value_of(rows: Sequence[Row], case: str, variant: str, field: str = "ms") -> float | None:
    """A field of a variant in the case whose name has this in it."""
    found = (row.get(field) for row in rows if row["variant"] == variant and case in row["case"])
    return next((value for value in found if value is not None), None)


def ratio(case: str, over: str, under: str, field: str = "ms") -> Callable[[Sequence[Row]], float | None]:
    """One variant's field over another's."""
    def measured(rows: Sequence[Row]) -> float | None:
        a, b = value_of(rows, case, over, field), value_of(rows, case, under, field)
        return a / b if a is not None and b else None
    return measured


def worst_case(rows: Sequence[Row]) -> float | None:
    """The least of the fastest peer's time over flora's, of all cases of one adapter and of stacks."""
    ratios = []
    for case in dict.fromkeys(row["case"] for row in rows if "clients" not in row["case"]):
        times = {row["variant"]: row["ms"] for row in rows if row["case"] == case}
        peers = [ms for name, ms in times.items() if name not in ("flora", "bare products") and not name.startswith("idea")]
        if peers and "flora" in times:
            ratios.append(min(peers) / times["flora"])
    return min(ratios, default=None)


def faster_loop(sequences: int) -> Callable[[Sequence[Row]], float | None]:
    """The faster of PEFT's loops in bf16 over flora's round, ten clients of so many sequences."""
    def measured(rows: Sequence[Row]) -> float | None:
        loops = [ratio(cohort(sequences), name, "flora")(rows) for name in ("PEFT loop", "PEFT loop, all bf16")]
        return min((value for value in loops if value is not None), default=None)
    return measured


def of_copy(rows: Sequence[Row]) -> float | None:
    times = value_of(rows, MERGE, "flora", "times_limit")
    return 1 / times if times else None


def of_copy_on_the_card(rows: Sequence[Row]) -> float | None:
    """The same without what the host takes: the operator alone."""
    limit, ms, card = (value_of(rows, MERGE, ALONE, field) for field in ("times_limit", "ms", "card_ms"))
    return ms / limit / card if limit and ms and card else None


def layer(model: str) -> str:
    return linears(model, 8192, "one adapter", [16], "bf16", BOTH)


def cohort(sequences: int) -> str:
    """What the names of all cases of ten clients on TinyLlama have in them."""
    return str(Case(10, sequences, 512, dtype="bfloat16"))


MERGE = merges("7B", 7 * BLOCKS["7B"], "bfloat16")
CLIENTS, DOWNLINK = (linears("7B", 8192, kind, KINDS[kind], "bf16", BOTH) for kind in ("clients", "downlink"))
LINEARS = "seven linears, forward + backward, r = 16, 8,192 rows"
TARGETS = [
    *(Target(f"{model}: {LINEARS}: times the bare products", "lora_linear", bound, False,
             ratio(layer(model), "flora", "bare products"))
      for model, bound in (("1B", 1.22), ("7B", 1.12), ("70B", 1.06))),
    *(Target(f"7B: the same: faster than {name}", "lora_linear", bound, True, ratio(layer("7B"), name, "flora"))
      for name, bound in (("peft, fp32 adapters (its default)", 1.5), ("peft", 1.25), ("addmm_ form", 1.08))),
    Target("every shape: the fastest peer's time over flora's", "lora_linear", 1.0, True, worst_case),
    Target("7B: ten clients, ranks 64 to 4, against one adapter of rank 16", "lora_linear", 1.05, False,
           ratio(CLIENTS, "flora", "flora, one adapter of rank 16")),
    Target("7B: a downlink of ten ranks of 64: times the addmm_ form", "lora_linear", 1.05, False,
           ratio(DOWNLINK, "flora", "addmm_ form")),
    Target("TinyLlama, ten clients of 1 x 512: faster than PEFT's loop in bf16", "round", 4.0, True, faster_loop(1)),
    Target("TinyLlama, ten clients of 8 x 512: faster than PEFT's loop in bf16", "round", 1.8, True, faster_loop(8)),
    Target("TinyLlama, ten clients of 8 x 512: peak memory over PEFT's loop at equal tokens in flight", "cohort", 0.8, False,
           ratio(cohort(8), "flora, one batch, PEFT's passes", "PEFT loop", "peak_mb")),
    Target("7B: merge of ten clients: share of the copy bandwidth", "merge", 0.85, True, of_copy),
    Target("7B: the same, the operator alone on the card", "merge", 0.85, True, of_copy_on_the_card),
    Target("7B: merge: faster than PEFT one by one", "merge", 25.0, True, ratio(MERGE, "PEFT one by one", "flora")),
    Target("7B: merge: faster than PEFT cat + merge", "merge", 2.0, True, ratio(MERGE, "PEFT cat + merge", "flora")),
    Target("7B: merge: against addmm_ of a ready bf16 stack", "merge", 1.0, False,
           ratio(MERGE, "flora", "addmm_ of a bfloat16 stack")),
    Target("7B: merge: MB beyond the 13,000 that were held (tables of pointers)", "merge", 32.0, False,
           lambda rows: value_of(rows, MERGE, "flora", "extra_mb")),
]


def rows_in(out: Path, name: str) -> list[Row]:
    path = out / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def table(rows: Sequence[Row]) -> str:
    """The Markdown table of one case."""
    extra = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    heads = ["variant", "ms", "quartiles", "× peer", "× limit", *(COLUMNS[key][0] for key in extra)]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        star, limit = "*" * (row["variant"] == row["against"]), row["times_limit"]
        numbers = ["–" if row.get(key) is None else format(row[key], COLUMNS[key][1]) for key in extra]
        lines.append("| " + " | ".join([row["variant"], f"{row['ms']:.3f}", f"{row['ms_low']:.3f} – {row['ms_high']:.3f}",
                                        f"{row['times_against']:.2f}{star}", f"{limit:.2f}" if limit else "–", *numbers]) + " |")
    return "\n".join(lines)


def targets_and_parts(out: Path) -> str:
    """The first two tables, as Markdown."""
    known = json.loads((out / "parts.json").read_text())
    lines = ["| part | | how it ended | s |", "| --- | --- | --- | ---: |"]
    lines += [f"| {name} | {part['about']} | {part['outcome']} | {part['seconds']:.0f} |" for name, part in known["parts"].items()]
    return "\n".join([*lines, "", *TARGET_HEAD, *(target.line(rows_in(out, target.file)) for target in TARGETS)])


def markdown(out: Path) -> str:
    """The whole summary of a folder that benchmarks/gpu.py wrote."""
    about = json.loads((out / "parts.json").read_text())["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    card = f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}" if about["gpu"] else f"CPU, {about['threads']} threads"
    parts = [f"# {card}", f"{versions}; commit {about['commit']}.", "ms: medians of calls that take turns, with quartiles; × peer: "
             "times that of the variant marked *; × limit: times what the device could do at most, measured in the same run.",
             targets_and_parts(out)]
    for path in sorted(out.glob("*.json")):
        timed = [row for row in json.loads(path.read_text()).get("rows", []) if row.get("ms") is not None]
        if timed:
            parts.append(f"## {path.stem}")
        for case in dict.fromkeys(row["case"] for row in timed):
            parts += [f"### {case}", table([row for row in timed if row["case"] == case])]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=folder())
    out = parser.parse_args().folder
    if not (out / "parts.json").exists():
        parser.error(f"expected parts.json in {out}; found none. make gpu writes it")
    (out / "summary.md").write_text(markdown(out), encoding="utf-8")
    print(f"wrote {out / 'summary.md'}")


if __name__ == "__main__":
    main()

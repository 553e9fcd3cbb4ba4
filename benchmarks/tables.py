"""Writes the tables of README.md and docs/ that are of benchmarks/results: python -m benchmarks.tables

A page has `<!-- table: NAME -->`, what was written last, and `<!-- end -->`; the names are in TABLES. No figure of them is typed.
"""
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import summary
from benchmarks.bench_lora_linear import BOTH
from benchmarks.measure import RESULTS
from benchmarks.shapes import RANKS
from benchmarks.summary import Row

ROOT = RESULTS.parents[1]
CPU = "cpu-2-threads"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Cells = Sequence[str]


def rows_of(name: str, results: Path) -> list[Row]:
    return summary.rows_in(results / CPU, name)


def written(heads: Cells, lines: Sequence[Cells]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def pivot(rows: Sequence[Row], first: str, variants: Mapping[str, str], field: str, spec: str, title: Callable[[str], str]) -> str:
    """A line a case, a column a variant; "–" for what was not measured."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        values = {row["variant"]: row.get(field) for row in rows if row["case"] == case}
        lines.append([title(case), *("–" if values.get(name) is None else format(values[name], spec) for name in variants)])
    return written([first, *variants.values()], lines)


def renamed(rows: Sequence[Row], old: str, new: str) -> list[Row]:
    """One variant under the name of another, where a column has both."""
    return [row | {"variant": new} if row["variant"] == old else row for row in rows]


def rates(results: Path) -> str:
    """Tokens a second by clients and sequences, PEFT's loop and flora; last a whole round."""
    variants = {name: name for name in ("PEFT loop", "flora, one by one", "flora, one batch")}
    rows = sorted(rows_of("cohort", results), key=lambda row: (row["sequences"], row["clients"]))
    rows += renamed(rows_of("round", results), "flora", "flora, one batch")

    def title(case: str) -> str:
        clients, sequences = re.search(r"(\d+) clients of (\d+) x", case).groups()
        of = f"{clients} client{'s' * (clients != '1')} of {sequences} sequence{'s' * (sequences != '1')}"
        return f"a round of {of}, aggregation and merge included" if case.startswith("a round") else of

    return pivot(rows, "tokens a second", variants, "tokens_per_second", ".0f", title)


def ways(results: Path) -> str:
    """Ten clients of one sequence by every way to train them: with the allocator's settings equal, and as a user runs each."""
    lines = []
    for file, how in (("cohort", "same allocator settings for all"), ("cohort_as_run", "as a user runs each")):
        rows = [row for row in rows_of(file, results)
                if (row["clients"], row["sequences"]) == (10, 1) and row["variant"] != "bare products"]
        loop = next(row["ms"] for row in rows if row["variant"] == "PEFT loop")
        lines += [[row["variant"], how, f"{row['tokens_per_second']:.0f}", f"{loop / row['ms']:.2f}",
                   f"{1 / row['times_limit']:.2f}", f"{row['peak_mb']:,.0f}"] for row in rows]
    return written(["ten clients of one sequence", "", "tokens/s", "against PEFT's loop", "share of the limit", "peak MB"], lines)


def engines(results: Path) -> str:
    """Seconds of a round of four clients by engine and size of the stack."""
    rows = rows_of("engines", results)
    sizes = sorted({row["megabytes"] for row in rows})
    by_engine = {name: {row["megabytes"]: f"{row['ms'] / 1e3:.1f}" for row in rows if row["variant"] == name}
                 for name in dict.fromkeys(row["variant"] for row in rows)}
    return written(["stack, of all clients", *(f"{size:g} MB" for size in sizes)],
                   [[name, *(found.get(size, "–") for size in sizes)] for name, found in by_engine.items()])


def linears(results: Path) -> str:
    """ms of the seven linears, forward and backward."""
    variants = {"flora": "flora", "peft": "PEFT", "peft, fp32 adapters (its default)": "PEFT, fp32 adapters",
                "addmm_ form": "`addmm_` form", "flora, one adapter of rank 16": "flora, one adapter of rank 16",
                "bare products": "bare products"}
    rows = [row for row in rows_of("lora_linear", results) if row["case"].endswith(BOTH)]
    many = ", ".join(map(str, RANKS))

    def title(case: str) -> str:
        return case.removeprefix("SmolLM2-135M, ").removesuffix(f", {BOTH}").replace(many, f"{RANKS[0]} to {RANKS[-1]}")

    return pivot(renamed(rows, "addmm_ form, client by client", "addmm_ form"), "ms", variants, "ms", ".1f", title)


def overhead(results: Path) -> str:
    """Microseconds of the host a call."""
    variants = {name: name for name in ("flora, by the rule", "flora, our passes", "flora, fused")}
    variants |= {"addmm form": "`addmm_` form", "peft": "PEFT"}
    rows = [row | {"us": 1e3 * row["ms"]} for row in rows_of("overhead", results)]
    return pivot(rows, "", variants, "us", ".0f", str)


def merges(results: Path) -> str:
    """ms of a merge of ten clients."""
    variants = {"flora": "flora", "addmm_ of an fp32 stack": "`addmm_` of a stack made beforehand, in fp32",
                "addmm_ of a bfloat16 stack": "in bf16", "cat, then addmm_": "concatenate, then `addmm_`",
                "PEFT one by one": "PEFT one by one", "PEFT cat + merge": "PEFT cat, then merge"}
    rows = [row for row in rows_of("merge", results) if row.get("ms") is not None]
    return pivot(rows, "weights", variants, "ms", ".1f", lambda case: "{0}, {2}".format(*re.split(r": |, ", case)))


def drift(results: Path) -> str:
    """Errors of 200 merges into bf16."""
    rows = [row for row in rows_of("merge", results) if "error" in row]
    found = {way: [f"{100 * row['error']:.1f} %" for row in rows if row["variant"] == way]
             for way in ("nearest", "stochastic", "residual")}
    return written(["", "one direction", "another direction each"], [[way, *errors] for way, errors in found.items()])


def gpu(results: Path) -> str:
    """The targets of every card's newest folder; a sentence where there is none."""
    newest = {path.parents[1].name: path.parent for path in sorted(results.glob("*/*/parts.json"))}
    if not newest:
        return "**No GPU has timed anything of flora yet.**"
    parts = []
    for card, out in newest.items():
        commit = json.loads((out / "parts.json").read_text())["about"]["commit"]
        lines = [target.line(summary.rows_in(out, target.file)) for target in summary.TARGETS]
        head = f"{card.replace('-', ' ')}, {out.name}, commit {str(commit)[:10]}:"
        parts.append("\n".join([head, "", *summary.TARGET_HEAD, *lines]))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[Path], str]] = {
    "rates": rates, "ways": ways, "engines": engines, "linears": linears, "overhead": overhead, "merges": merges, "drift": drift,
    "gpu": gpu}


def page(text: str, results: Path = RESULTS) -> str:
    """A page with its tables as the results are now. Raises KeyError for a table that is not in TABLES."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]](results)}\n{found[3]}", text)


def pages() -> list[Path]:
    found = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    return [path for path in found if BLOCK.search(path.read_text(encoding="utf-8"))]


def main() -> None:
    for path in pages():
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

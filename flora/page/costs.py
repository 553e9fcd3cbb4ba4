"""The parts of a page on what a run cost: bytes, seconds, errors of the aggregate, ranks that it used, kernels."""
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from flora.page import cost
from flora.page.facts import (
    ENERGIES,
    by_round,
    carried_errors,
    kind,
    last_round,
    phases,
    product_errors,
    ranks_for,
)
from flora.page.facts import seconds as seconds_of
from flora.page.facts import (
    spectrum as spectrum_of,
)
from flora.page.gather import Run, Series, number
from flora.page.parts import Cell, Plot, Section, Table, count, word
from flora.page.reference import equivalents
from flora.page.units import plain, quantity, whole

CARRIED = {"downlink_error": "downlink form", "merge_error": "merge beside the base", "compress_error": "compression in a group"}


def whole_seconds(run: Run) -> float:
    """Seconds of all phases of a run."""
    return sum(sum(seconds_of(row).values()) for row in run.server)


def traffic(series: Sequence[Series]) -> Section:
    """Bytes by round, against the budget, and beside other ways to train."""
    ways = {one.name: {"up": by_round(one, "bytes_up"), "down": by_round(one, "bytes_down")} for one in series}
    sums = {one.name: _so_far(one) for one in series}
    budgets = sorted({1e6 * mb for one in series if (mb := number(one.first.config.get("communication_budget_mb")))})
    plots = [Plot("Bytes by round", "Full: up; hatched: down. Down at a round is what its aggregate takes to those who get it; "
                                    "at round 0 what "
                  "is sent before the first.", cost.traffic(ways)),
             Plot("Bytes so far", "Up and down, all clients together" + ("; dashed: the budget." if budgets else "; no budget "
                                                                                                                 "was set "
                  "(communication_budget_mb)."), cost.cumulative(sums, budgets))]
    totals, notes = _beside(series, sums)
    tables = []
    if totals:
        full = max(total for name, (total, n) in totals.items() if n is None)
        plots.append(Plot("Beside other ways to train", "Grey: the same clients and rounds. Full fine-tuning: every parameter up "
                                                        "and down; "
                          "full-rank layers: the adapted layers as dense updates; averaged: adapters of the same ranks, as many "
                          "bytes down as "
                          "up (FedIT, zero-padding). Centralised training sends no model, but every "
                          "row.", cost.beside(totals), True))
        rows = [[word(name, n), count(total, quantity(total, "B")), count(total / full, f"{100 * total / full:.3g} %")]
                for name, (total, n) in totals.items()]
        tables.append(Table("Bytes as a share of full fine-tuning", ("way", "up and down#", "of full fine-tuning#"), rows,
                            note="Without the first copy of the base model, which every way needs once."))
    return Section("traffic", "Bytes", "Bytes of the encoded messages, counted by the run, without the base "
                                       "model.", plots, tables, notes)


def _beside(series: Sequence[Series],
            sums: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, tuple[float, int | None]], list[str]]:
    """Bytes of the series and of other ways to train, the most first, each once, with the number of its series or None; notes."""
    totals: dict[str, tuple[float, int | None]] = {}
    notes = []
    for n, one in enumerate(series):
        sent = max(sums[one.name].values(), default=0.0)
        same, why = equivalents(one.first)
        if same is None or not sent:
            notes.append(f"{one.name}: {why or 'nothing travelled: all is trained at home, or by one party'}.")
            continue
        totals[one.name] = (sent, n)
        for way, total in (("full fine-tuning", same.full), ("full-rank layers", same.dense), ("averaged adapters", same.averaged)):
            known = totals.get(way)
            totals[way if known is None or known[0] == total else f"{way}, {one.name}"] = (total, None)
    return dict(sorted(totals.items(), key=lambda item: -item[1][0])), notes


def _so_far(one: Series) -> dict[int, float]:
    """Bytes up and down until the end of every round: means over the runs."""
    up, down = by_round(one, "bytes_up"), by_round(one, "bytes_down")
    both = {done: sum(found[done]["mean"] for found in (up, down) if done in found) for done in sorted({*up, *down})}
    return dict(zip(both, accumulate(both.values()), strict=True))


def seconds(series: Sequence[Series]) -> Section:
    """Seconds by phase, and by round."""
    found = {one.name: phases(one) for one in series}
    if not any(found.values()):
        return Section("seconds", "Seconds", "Time by phase.", notes=["No row of metrics.jsonl has seconds."])
    by_phase = cost.phases(found)
    height = by_phase.layout.height
    seeded = "; means over seeds" if any(len(one.runs) > 1 for one in series) else ""
    plots = [Plot("By phase", f"Sums over the rounds of a run{seeded}.", by_phase)]
    if len(series) == 1 and len(series[0].runs) == 1:
        rounds = {int(row["rounds_done"]): seconds_of(row) for row in series[0].first.server}
        plots.append(Plot("By round", "The bar at 0 is the evaluation before the first round.",
                          cost.by_phase(rounds, list(found[series[0].name]), height)))
    else:
        totals = {one.name: _by_round(one) for one in series}
        plots.append(Plot("By round", "All phases of a round together.", cost.round_seconds(totals, height)))
    return Section("seconds", "Seconds", "Wall-clock time of the machine that ran it, all clients together, by the phases that "
                   "metrics.jsonl names.", plots)


def _by_round(one: Series) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for row in (row for run in one.runs for row in run.server):
        found.setdefault(int(row["rounds_done"]), []).append(sum(seconds_of(row).values()))
    return {done: statistics.fmean(found[done]) for done in sorted(found)}


def errors(series: Sequence[Series]) -> Section:
    """What flora verify says of the first run of every series, and the errors that rows carry."""
    from flora.verification import conclusion

    rows, notes, lines, carried = [], [], {}, []
    for n, one in enumerate(series):
        found, why = product_errors(one.first)
        kept = [row for row in found if row["error"] is not None]
        if why or not kept:
            notes.append(f"{one.name}: {why or conclusion(found)}")
        else:
            notes.append(f"{one.name}: {conclusion(found)}")
            lines[one.name] = {row["round"]: row["error"] for row in kept}
        rows += [[word(one.name, n), *_compared(row)] for row in kept]
        carried += [[word(one.name, n), word(CARRIED[key]), count(value, f"{value:.1e}")]
                    for key, value in carried_errors(one.first).items()]
    columns = ("run", "round#", "clients#", "error#", "exact", "worst layer's#", "worst layer")
    tables = [Table("Aggregate against Σ p_k ΔW_k", columns, rows)] if rows else []
    if carried:
        tables.append(Table("Errors that the rows carry, the largest", ("run", "of", "relative error#"), carried))
    several = {name: found for name, found in lines.items() if len(found) > 1}
    plots = [Plot("Relative error by round", "On a scale of factors of ten; fp32 rounds at about "
                                             "1e-7.", cost.errors(several))] if several else []
    return Section("errors", "Product error", "‖aggregate − Σ p_k ΔW_k‖ / ‖Σ p_k ΔW_k‖ (Frobenius), formed once more in fp64 "
                                              "from the adapters that "
                   "the run kept: what flora verify computes. keep_rounds says for how many rounds they are "
                   "kept.", plots, tables, notes)


def _compared(row: Mapping[str, Any]) -> list[Cell]:
    return [count(row["round"], str(row["round"])), count(row["clients"], str(row["clients"])),
            count(row["error"], f"{row['error']:.1e}"), word("yes" if row["exact"] else "no"),
            count(row["layer_error"], f"{row['layer_error']:.1e}"), word(row["layer"])]


def spectrum(series: Sequence[Series]) -> Section:
    """Singular values of the last aggregate, and how many of its ranks hold its energy."""
    found: dict[str, Mapping[str, Sequence[float]]] = {}
    rows, notes = [], []
    for n, one in enumerate(series):
        layers, why = spectrum_of(one.first)
        if not layers:
            notes.append(f"{one.name}: {why}.")
            continue
        found[one.name] = layers
        for what in dict.fromkeys(map(kind, layers)):
            mine = [sigma for layer, sigma in layers.items() if kind(layer) == what]
            counts = [[ranks_for(sigma, share) for sigma in mine] for share in ENERGIES]
            norms = [sum(s * s for s in sigma) ** 0.5 for sigma in mine]
            rows.append([word(one.name, n), word(what), count(len(mine), str(len(mine))),
                         count(statistics.median(map(len, mine)), whole(statistics.median(map(len, mine)))),
                         *(count(statistics.median(c), f"{whole(statistics.median(c))} ({min(c)} to {max(c)})") for c in counts),
                         count(statistics.median(norms), plain(statistics.median(norms), ".3g"))])
    if not found:
        return Section("spectrum", "Ranks that are used", "Singular values of the last aggregate.", notes=notes)
    at = {name: last_round(one.first) for one in series if (name := one.name) in found}
    said = ", ".join(dict.fromkeys(f"round {path.name}" for path in at.values() if path))
    plots = [Plot("Singular values", "σ_i of a layer over its largest: the median over all layers, and a band from the least to "
                                     "the largest.",
                  cost.falling(found)),
             Plot("Ranks that hold the energy", "By kind of layer, medians: full, 90 % of Σ σ²; open, 99 %; the bar ends at the "
                                                "rank of the "
                  "aggregate.", cost.used(found))]
    table = Table("By kind of layer", ("run", "kind", "layers#", "rank#", "for 90 %#", "for 99 %#", "‖ΔW‖#"), rows,
                  note="Medians over the layers of a kind; in brackets the least and the most.")
    return Section("spectrum", "Ranks that are used", f"The aggregate of {said}, from the adapters that the run kept, through an "
                                                      f"(R, R) core: nothing "
                   "dense is formed. How far 99 % lies below the rank says what a compressed downlink would "
                   "save.", plots, [table], notes)


def kernels(series: Sequence[Series]) -> Section:
    """Which backend ran every operator; runs of the same table share it."""
    tables: dict[str, tuple[list[str], list[list[Cell]]]] = {}
    notes = []
    for one in series:
        given = one.first.environment.get("kernels")
        rows = [row for row in given if isinstance(row, dict)] if isinstance(given, list) else []
        if not rows:
            notes.append(f"{one.name}: environment.json names no kernels; flora doctor says what runs on a machine.")
            continue
        cells = [[word(row.get(key)) for key in ("operator", "device", "backend", "why")] for row in rows]
        tables.setdefault(str(cells), ([], cells))[0].append(one.name)
    made = [Table(", ".join(names), ("operator", "device", "backend", "why"), cells) for names, cells in tables.values()]
    return Section("kernels", "Kernels", "What ran every operator where the run was started, from "
                                         "environment.json.", tables=made, notes=notes,
                   legend=False)

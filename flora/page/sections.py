"""The parts of a page, in their order, and those of what was run and reached; what it cost is in costs.py."""
from collections.abc import Sequence
from typing import Any

from flora.page import costs, quality
from flora.page.facts import Member, by_round, flat, members, over_clients, summed
from flora.page.gather import WHERE, Run, Series, number
from flora.page.parts import Cell, Plot, Section, Table, count, word
from flora.page.reference import differing, label_counts
from flora.page.units import duration, plain, quantity, whole

MOST_LINES = 40                                                 # clients that have a line each
SCORES = {"eval_label_accuracy": "Label accuracy", "eval_exact_match": "Exact match", "eval_lm_eval": "Multiple choice (lm-eval)"}
GLANCE = ("run", "strategy", "rounds#", "seeds#", "loss before#", "loss after#", "accuracy#", "bytes up#", "bytes down#", "time#")
CLIENT = ("client", "rank#", "alpha#", "rows#", "rounds#", "loss before#", "loss after#", "change#", "accuracy before#",
          "accuracy after#", "bytes up#", "bytes down#", "time#")
MAIN = ("model_name_or_path", "dataset", "strategy", "num_rounds", "num_clients", "lora_r", "lora_alpha", "target_modules",
        "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "max_length", "partition.by",
        "partition.iid", "partition.dirichlet_alpha", "partition.label", "partition.shards", "dtype", "seed")


def sections(series: Sequence[Series]) -> list[Section]:
    """Every part of the page of these series."""
    found = [setting(series), reached(series), clients(series), labels(series), costs.traffic(series), costs.seconds(series),
             costs.errors(series), costs.spectrum(series), costs.kernels(series)]
    return found + ([failures(series)] if any(run.failures for one in series for run in one.runs) else [])


def _ends(one: Series, key: str) -> tuple[float | None, float | None]:
    """The first and the last mean over the runs of a number of the server's rows."""
    found = [spread["mean"] for spread in by_round(one, key).values()]
    return (found[0], found[-1]) if found else (None, None)


def setting(series: Sequence[Series]) -> Section:
    """What was run, on what, and what came of it: tiles of one run, a line a series of several."""
    alone = len(series) == 1 and len(series[0].runs) == 1
    tables = [] if alone else [Table("At a glance", GLANCE, [_line(one, n) for n, one in enumerate(series)], note="Bytes and time "
                                     "are of a whole run, all clients together; means where there are several seeds.")]
    configs = {one.name: flat(one.first.config) for one in series}
    differ = [key for key in differing(configs) if key not in WHERE] if len(series) > 1 else []
    if differ:
        tables.append(Table("What differs between the runs", ("key", *configs),
                            [[word(key), *(word(config.get(key)) for config in configs.values())] for key in differ]))
    tables += [Table(f"Every key of {one.name}", ("key", "value"), [[word(key), word(value)] for key, value in
                                                                   configs[one.name].items()], folded=True) for one in series]
    notes = [f"Left out, as no round is finished: {', '.join(one.left_out)}." for one in series if one.left_out]
    shared = {key: value for key, value in configs[series[0].name].items() if key not in differ and value is not None}
    facts = {_plain(key): _value(shared[key]) for key in MAIN if key in shared and shared[key] not in (False, {}, [])}
    seeds = [run.config.get("seed") for one in series for run in one.runs]
    facts["seed"] = ", ".join(dict.fromkeys(map(str, seeds)))
    return Section("setting", "What was run", "From config.yaml, environment.json and run.json of the run folder.",
                   tables=tables, facts=facts | _machine(series[0].first), notes=notes, tiles=_tiles(series[0]) if alone else {})


def _sums(one: Series) -> tuple[float, float, float]:
    """Bytes up, bytes down and seconds of a whole run, means over the runs."""
    own = [(summed(run.server, "bytes_up"), summed(run.server, "bytes_down"), costs.whole_seconds(run)) for run in one.runs]
    up, down, took = (sum(column) / len(own) for column in zip(*own, strict=True))
    return up, down, took


def _line(one: Series, n: int) -> list[Cell]:
    (first, last), (_, right), (up, down, took) = _ends(one, "eval_loss"), _ends(one, "eval_accuracy"), _sums(one)
    return [word(one.name, n), word(one.first.config.get("strategy")), count(one.first.rounds_done, _rounds(one)),
            count(len(one.runs), str(len(one.runs))), count(first, plain(first)), count(last, plain(last)),
            count(right, plain(right, ".1%")), count(up, quantity(up, "B")), count(down, quantity(down, "B")),
            count(took, duration(took))]


def _tiles(one: Series) -> dict[str, str]:
    losses, rights, (up, down, took) = _ends(one, "eval_loss"), _ends(one, "eval_accuracy"), _sums(one)
    epsilon = [value for row in one.first.server if (value := number(row.get("epsilon"))) is not None]
    return {"rounds": _rounds(one), "held-out loss": " → ".join(plain(v, ".3f") for v in losses),
            "next-token accuracy": " → ".join(plain(v, ".1%") for v in rights), "bytes up": quantity(up, "B"),
            "bytes down": quantity(down, "B"), "time": duration(took)} | ({"ε": f"{max(epsilon):.2f}"} if epsilon else {})


def _rounds(one: Series) -> str:
    """Rounds done of those asked for, and how the run stands where it is not finished."""
    asked, states = one.first.config.get("num_rounds"), {run.state for run in one.runs}
    said = f"{one.first.rounds_done} of {asked}" if asked is not None else str(one.first.rounds_done)
    return said if states == {"finished"} else f"{said}, {', '.join(sorted(states - {'finished'}))}"


def _plain(key: str) -> str:
    known = {"model_name_or_path": "model", "lora_r": "ranks", "lora_alpha": "alpha", "num_clients": "clients",
             "num_rounds": "rounds", "per_device_train_batch_size": "batch"}
    return known.get(key, key.replace("partition.", "partition, ").replace("_", " "))


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machine(run: Run) -> dict[str, str]:
    """Device, versions and commit, as they were recorded."""
    env = run.environment
    versions = env.get("versions") if isinstance(env.get("versions"), dict) else {}
    kept = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    device = env.get("gpu") or (f"CPU, {env.get('machine', 'unknown')}, threads: "
                                f"{env.get('threads', '?')}" if env else "not recorded")
    return {"device": str(device), "versions": kept or "not recorded", "commit": str(env.get("commit") or "not recorded")}


def reached(series: Sequence[Series]) -> Section:
    """Loss and accuracy by round, of the global model and of the clients on their own rows."""
    seeded = any(len(one.runs) > 1 for one in series)
    band = "; the band is ± one standard deviation over seeds" if seeded else ""
    plots, notes = [], []
    for key, title, y, form in (("eval_loss", "Held-out loss", "nats a token", ".4f"),
                                ("eval_accuracy", "Next-token accuracy", "of held-out tokens", ".2%"),
                                *((key, title, "of held-out rows", ".1%") for key, title in SCORES.items())):
        found = {one.name: values for one in series if (values := by_round(one, key))}
        if found:
            single = "; one evaluation, so there is no line yet" if max(map(len, found.values())) == 1 else ""
            said = f"Global model, rows that only the server holds{band}{single}."
            plots.append(Plot(title, said, quality.lines(found, y, form)))
        elif key not in SCORES:
            notes.append(f"{title}: not measured; the rows have no {key}. Lower eval_every.")
    boxes = {one.name: found for one in series if (found := over_clients(one, "eval_loss_after"))}
    if boxes:
        plots.append(Plot("Clients on their own rows, after training", "Median, quartiles, least and largest loss of the round's "
                          f"clients{', of all seeds' if seeded else ''}.", quality.client_spread(boxes, "nats a token")))
    else:
        notes.append("Spread over clients: not measured; give every client held-out rows (eval_rows_per_client).")
    return Section("reached", "Loss and accuracy", "Round 0 is the model before training. From the rows of metrics.jsonl.", plots,
                   notes=notes)


def clients(series: Sequence[Series]) -> Section:
    """Every client's rank, rows, and loss before and after."""
    found = {one.name: members(one.first) for one in series}
    measured = {name: [m for m in own if m.change is not None] for name, own in found.items()}
    known, plots, notes = any(measured.values()), [], []
    of_one = " Runs with several seeds show the first." if any(len(one.runs) > 1 for one in series) else ""
    names = {m.name for own in measured.values() for m in own}
    if known and len(names) <= MOST_LINES:
        plots.append(Plot("Before and after", "Open: before its first round, with what the server sent; full: after its last, "
                                              "with its own "
                          f"adapter.{of_one}", quality.before_after(measured), len(names) > 12))
    if known:
        plots.append(Plot("What each has gained, by rank", f"Below the dotted line the loss has fallen; a mark's area is the "
                                                           f"client's number of "
                          f"rows.{of_one}", quality.by_rank(measured)))
    else:
        notes.append("Losses of clients: not measured; give every client held-out rows (eval_rows_per_client).")
    several = len(series) > 1 or any(len(one.runs) > 1 for one in series)
    rows = [[*([word(one.name, n), count(number(run.config.get("seed")), str(run.config.get("seed")))] if several else []),
             *_cells(m)] for n, one in enumerate(series) for run in one.runs for m in members(run)]
    table = Table("Every client", (("run", "seed#") if several else ()) + CLIENT, rows, note="A click on a column's name sorts "
                                                                                              "by it. Rows: of "
                  "training. A client's own held-out set is small: its loss is a sign of life more than a comparison.")
    return Section("clients", "Clients", "A client's rank, its data, and its loss on its own held-out rows.", plots, [table], notes)


def _cells(m: Member) -> list[Cell]:
    before, after = m.loss
    first, last = m.accuracy
    return [word(m.name), count(m.rank, whole(m.rank)), count(m.alpha, plain(m.alpha, "g")), count(m.rows, whole(m.rows)),
            count(m.rounds, str(m.rounds)), count(before, plain(before)), count(after, plain(after)),
            count(m.change, plain(m.change, "+.4f")), count(first, plain(first, ".1%")), count(last, plain(last, ".1%")),
            count(m.bytes_up, quantity(m.bytes_up, "B")), count(m.bytes_down, quantity(m.bytes_down, "B")),
            count(m.seconds, duration(m.seconds))]


def labels(series: Sequence[Series]) -> Section:
    """How labels lie over the clients; runs on the same partition share a plot."""
    notes, shared = [], []
    for one in series:
        column, found, why = label_counts(one.first)
        if not found:
            notes.append(f"{one.name}: {why}.")
            continue
        names = next((names for *known, names in shared if known == [column, found]), None)
        if names is None:
            shared.append([column, found, [one.name]])
        else:
            names.append(one.name)
    seeds = " Of the first seed." if any(len(one.runs) > 1 for one in series) else ""
    plots = []
    for column, found, names in shared:
        some = f" The first {MOST_LINES} of {len(found)} clients are drawn." if len(found) > MOST_LINES else ""
        plots.append(Plot(f"{column}: "
                          f"{', '.join(names) if len(series) > 1 else 'rows of every client'}", "Shares of a client's training "
                                                                                                "rows, "
                          f"and of all clients' together.{some}{seeds}", quality.labels(found, MOST_LINES), True))
    return Section("labels", "Labels", "The rows are dealt once more as the run dealt them. Bars that differ much: a skewed "
                                       "partition.", plots,
                   notes=notes, legend=False)


def failures(series: Sequence[Series]) -> Section:
    """Clients that were left out of a round, with the reason."""
    rows = [[word(one.name, n), count(number(row.get("round")), whole(number(row.get("round")))), word(row.get("client")),
             word(row.get("reason"))] for n, one in enumerate(series) for run in one.runs for row in run.failures]
    return Section("failures", "Left out", "Clients whose answer of a round was not taken, and why.",
                   tables=[Table("Answers that were not taken", ("run", "round#", "client", "reason"), rows)])

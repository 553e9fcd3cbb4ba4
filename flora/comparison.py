"""`flora compare`: strategies on equal terms, over several seeds, in run folders that a second call goes on with.

Data, partition, order of rows, sampling and budget follow from the config and the seed alone, so runs of one seed differ in their
entry and in nothing else. An entry is a strategy's name, or a variant of it: flora:start=warm+learning_rate=1e-3.

    DIR/ENTRY/seed-N                            a run folder each
    DIR/compare.json  compare.md  compare.svg   every number by round and seed; the tables; loss and accuracy by round
"""
import contextlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from flora import tables, timing
from flora.checkpoint import RunFolder, disk_errors
from flora.config import RunConfig, load, parse
from flora.engines.local import run
from flora.engines.prepare import rehearse
from flora.errors import ConfigError, RunError, StrategyError
from flora.files import safe_name, write_text
from flora.plots import draw
from flora.report import read_metrics
from flora.spread import LOSS, finite, numbers, over_seeds, paired
from flora.strategies import strategy_named

OURS = ("strategy", "seed", "output_dir", "overwrite", "quiet")      # what a comparison sets for each of its runs
NO_RESULT = ("output_dir", "overwrite", "quiet", "report_to", "profile")       # keys that change no number


@dataclass(frozen=True)
class Variant:
    """What runs for every seed. name: also of its folder; entry: as it was asked for; config: of the comparison's own seed."""
    name: str
    entry: str
    config: RunConfig


def split_entries(text: str) -> list[str]:
    """Entries with commas between them; a comma within brackets is a list's: flora:lora_r=[8,4],fedit."""
    return [entry.strip() for entry in re.split(r",(?![^\[{]*[\]}])", text) if entry.strip()]


def variant(base: RunConfig, entry: str, name: str = "") -> Variant:
    """An entry's config: NAME, or NAME:key=value+key=value with YAML's values and a dot for keys of partition.

    Raises ConfigError for an unknown or reserved key, StrategyError for an unknown strategy, clients that it cannot combine, or an
    option of another strategy.
    """
    strategy, _, given = entry.partition(":")
    strategy_named(strategy)
    settings: dict[str, Any] = {**base.model_dump(), "strategy": strategy}
    for pair in re.split(r"\+(?=[A-Za-z_.]+=)", given) if given else []:
        key, equals, value = pair.partition("=")
        if not equals or key in OURS:
            raise ConfigError(f"{entry}: expected key=value pairs with + between them, of keys other than {', '.join(OURS)}; got "
                              f"{pair!r}")
        try:
            _put(settings, key, yaml.safe_load(value))
        except yaml.YAMLError:
            raise ConfigError(f"{entry}: expected a YAML value for {key}; got {value!r}") from None
    config = parse(settings, entry)
    try:
        rehearse(config)
    except (ConfigError, StrategyError) as error:
        raise type(error)(f"{entry}: {error}") from None
    return Variant(name or entry, entry, config)


def _put(settings: dict[str, Any], key: str, value: object) -> None:
    outer, dot, inner = key.partition(".")
    settings[outer] = {**settings.get(outer, {}), inner: value} if dot and outer == "partition" else value


def planned(base: RunConfig, entries: Sequence[str], rates: Sequence[float] = ()) -> list[Variant]:
    """The variants of all entries, each at every learning rate where some are given. Raises ConfigError, StrategyError."""
    for what, given in (("entries", entries), ("learning rates", rates)):
        if len(set(given)) != len(given) or (what == "entries" and not given):
            raise ConfigError(f"expected {what} to compare, each once; got {', '.join(map(str, given)) or 'none'}")
    plain = [variant(base, entry) for entry in entries]
    if not rates:
        return plain
    taken = [one.entry for one in plain if "learning_rate=" in one.entry]
    if taken:
        raise ConfigError(f"expected entries without learning_rate beside a grid of learning rates; got {taken[0]}")
    at = [(entry, f"{entry}{'+' if ':' in entry else ':'}learning_rate={float(rate)!r}") for entry in entries for rate in rates]
    return [Variant(name, entry, variant(base, name).config) for entry, name in at]


def _wanted(one: Variant, seed: int, where: Path) -> RunConfig:
    folder = where / safe_name(one.name) / f"seed-{seed}"
    return one.config.model_copy(update={"seed": seed, "output_dir": str(folder)})


def how_far(wanted: RunConfig) -> str:
    """"new", "resume" or "finished": what the folder of a run holds. Raises RunError where it holds a run of another config."""
    path = Path(wanted.output_dir)
    state = RunFolder(path, overwrite=True).state()
    started = any(path.glob("checkpoint/[0-9]*"))
    if wanted.overwrite or not (state.get("state") == "finished" or (state and started)):
        return "new"
    had = parse({**load(path / "config.yaml"), "output_dir": wanted.output_dir}, str(path / "config.yaml"))
    differ = [f"{key} ({getattr(had, key)!r} there, {getattr(wanted, key)!r} now)" for key in RunConfig.model_fields
              if key not in NO_RESULT and getattr(had, key) != getattr(wanted, key)]
    if differ:
        raise RunError(f"{path} holds a run with another config: {', '.join(differ)}. Choose another --output_dir, or replace "
                       "it with --overwrite.")
    return "finished" if state["state"] == "finished" else "resume"


def _run(wanted: RunConfig, how: str) -> None:
    """One run, with its display and without its tables: a comparison prints one for all."""
    with contextlib.redirect_stdout(io.StringIO()):
        if how == "resume":
            run(wanted, resume=True)
        else:
            run(wanted.model_copy(update={"overwrite": True}))


def compare(config: RunConfig | Mapping[str, Any] | str | Path, strategies: Sequence[str], seeds: Sequence[int] = (0,),
            learning_rates: Sequence[float] = ()) -> Path:
    """Runs every entry with every seed, and returns the folder (the config's output_dir) with compare.json, .md and .svg.

    strategies: names, or variants such as "flora:start=warm"; the others are compared with the first, seed by seed (spread.paired).
    learning_rates: each entry is shown at its own best, by the mean of the final loss. Finished runs are kept and unfinished ones
    go on, unless the config says overwrite. Raises ConfigError, StrategyError, RunError before anything runs, and what run raises.
    """
    if not isinstance(config, RunConfig):
        config = parse(config) if isinstance(config, Mapping) else parse(load(config), str(config))
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"expected seeds, each once; got {seeds}")
    plan = planned(config, strategies, learning_rates)
    where = _folder(config)
    jobs = [(one, seed, _wanted(one, seed, where)) for seed in seeds for one in plan]
    found = [how_far(wanted) for _, _, wanted in jobs]          # all of them, before the first runs
    console = Console(stderr=True, quiet=config.quiet)
    for number, ((one, seed, wanted), how) in enumerate(zip(jobs, found, strict=True), 1):
        note = {"finished": ": finished before", "resume": ": goes on"}.get(how, "")
        console.print(f"{one.name}, seed {seed} ({number} of {len(jobs)}){note}", highlight=False, markup=False, soft_wrap=True)
        if how != "finished":
            _run(wanted, how)
    results = {one.name: _measured(one, {seed: wanted for other, seed, wanted in jobs if other is one}) for one in plan}
    _report(where, config, [choice(entry, plan, results) for entry in strategies], results, bool(learning_rates))
    return where


def _folder(config: RunConfig) -> Path:
    """Where the comparison goes. Raises RunError for the folder of a single run."""
    default = RunConfig.model_fields["output_dir"].default
    where = Path("runs/compare" if config.output_dir == default else config.output_dir).expanduser()
    if (where / "run.json").exists():
        raise RunError(f"expected a folder for several runs; got {where}, which holds one. Choose another --output_dir.")
    return where


def _measured(one: Variant, wanted: Mapping[int, RunConfig]) -> dict[str, Any]:
    runs = {seed: numbers(read_metrics(config.output_dir), config.output_dir) for seed, config in wanted.items()}
    return {"name": one.name, "entry": one.entry, "strategy": one.config.strategy, "learning_rate": one.config.learning_rate,
            "seeds": list(runs), "runs": runs, **over_seeds(runs)}


def choice(entry: str, plan: Iterable[Variant], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An entry's variants by learning rate, and the best by the mean of the final loss; edge: none was tried on one side of it.
    A rate at which a seed diverged is never the best, unless all did."""
    mine = [results[one.name] for one in plan if one.entry == entry]
    losses = {found["learning_rate"]: found["final"][LOSS] for found in mine}
    best = min(mine, key=lambda found: found["final"][LOSS]["mean"] if finite(found["final"][LOSS]["mean"]) else math.inf)
    rate = best["learning_rate"]
    return {"entry": entry, "losses": losses, "best": rate, "edge": rate in (min(losses), max(losses)), "variant": best["name"]}


def _report(where: Path, config: RunConfig, choices: Sequence[Mapping[str, Any]], results: Mapping[str, dict[str, Any]],
            grid: bool) -> None:
    """The tables on the terminal and in compare.md, every number in compare.json, the lines in compare.svg."""
    entries = [dict(results[chosen["variant"]]) for chosen in choices]
    for entry, chosen in zip(entries, choices, strict=True):
        entry["name"] = f"{chosen['entry']} at {chosen['best']:g}" if grid else chosen["entry"]
        entry["against_first"] = {name: paired(values, entries[0]["final_by_seed"].get(name, {}))
                                  for name, values in entry["final_by_seed"].items()}
    if timing.clocked(entries):
        for entry, found in zip(entries, timing.by_clock(entries), strict=True):
            entry["clock"] = found
    pages = [tables.final(entries), tables.by_round(entries), *([tables.against(entries)] if len(entries) > 1 else []),
             *(tables.clock(entries) if "clock" in entries[0] else []), *([tables.grid(choices)] if grid else [])]
    facts = {"config": config.model_dump(exclude={"strategy", "seed", *NO_RESULT}), "entries": entries,
             "learning_rates": choices if grid else None, "variants": list(results.values())}
    with disk_errors(where):
        write_text(where / "compare.json", json.dumps(_strict(facts), indent=1, allow_nan=False) + "\n")
        drawn = draw(entries, where / "compare.svg")
        image = ["![Loss and accuracy by round](compare.svg)\n"] if drawn else []
        write_text(where / "compare.md", "\n".join(["# Comparison\n", *image, *(page.markdown() for page in pages)]))
    console = Console()
    if config.quiet:
        console.print(where, highlight=False, markup=False, soft_wrap=True)
        return
    for page in pages:
        console.print(page.rich())
    if not drawn:
        console.print("no plot: matplotlib is missing; pip install 'flora[plot]', and compare again", markup=False)
    console.print(f"every number is in {where / 'compare.json'}, the tables in {where / 'compare.md'}", highlight=False,
                  markup=False, soft_wrap=True)


def _strict(value: Any) -> Any:
    """The same for JSON, which has no NaN: null."""
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

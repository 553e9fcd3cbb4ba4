"""The verbs, `flora run`, `resume`, `compare` and so on (USAGE); an error says what to do."""
import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Annotated

from flora.errors import ConfigError, FloraError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from flora.config import RunConfig

USAGE = """\
flora: federated LoRA fine-tuning with mixed ranks, aggregated exactly

  flora run [CONFIG.yaml] [--key value ...]   run a federated fine-tuning     flora run --lora_r 64 16 4 --num_clients 3
  flora run ... --dry-run                     clients, ranks, steps and bytes, without weights or training
  flora resume FOLDER                         go on with an interrupted run   flora resume runs/demo
  flora compare [CONFIG.yaml] --strategies A,B[:key=value] [--seeds 0,1,2] [--lr-grid 1e-4,1e-3] [--key value ...]
                                              strategies on equal terms       flora compare c.yaml --strategies flora,fedit
  flora verify FOLDER                         aggregates, recomputed in fp64  flora verify runs/demo
  flora report RUN [RUN ...] [--out FILE.html]
                                              one HTML page of plots, tables  flora report runs/demo
  flora export FOLDER --out DIR [--client NAME]
                                              the result, with a model card   flora export runs/demo --out demo-model
  flora partition [CONFIG.yaml] [--groups N] [--plot FILE.svg] [--label COLUMN] [--key value ...]
                                              labels of clients and groups    flora partition c.yaml --groups 8 --plot labels.svg
  flora fetch [NAME ...]                      models and data by name         flora fetch smollm2-135m chitchat
  flora merge BASE ADAPTER ... --out DIR      PEFT adapters into a model      flora merge smollm2-135m alice bob --out merged
  flora init flower DIR                       an app that runs on Flower      flora init flower app
  flora tune [--shapes OUTxIN ...]            measure kernel forms on this GPU        flora tune --shapes 4096x4096
  flora doctor                                what works here, what is missing and what that costs

  flora run --help lists every key. --debug, anywhere, shows the traceback of an error. Exit codes: 0 done, 1 refused or
  failed (the message says what to do), 2 wrong usage, 130 Ctrl-C.
"""


# Keys with keys of their own that a command line has no room for.
FILE_ONLY = ("groups", "fleet", "privacy", "secure_aggregation", "limits")


class _Usage(Exception):
    """Words after `flora` that are no call of it."""


def _config(arguments: list[str], verb: str) -> "RunConfig":
    """A verb's config: the file that the first word names, if it is no option, and options over it."""
    from flora.config import load, parse

    arguments, settings, name = list(arguments), {}, ""
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        settings = load(name)
    config = parse(settings, name or "the settings")
    if arguments:
        import tyro

        options = _options(config)
        program = f"flora {verb} [CONFIG.yaml]"
        given = dataclasses.asdict(tyro.cli(type(options), prog=program, args=arguments, default=options))
        settings = {**config.model_dump(), **given}
        config = parse(settings, f"{name} and the command line" if name else "the command line")
    return config


def _run(arguments: list[str]) -> None:
    dry = "--dry-run" in arguments
    config = _config([argument for argument in arguments if argument != "--dry-run"], "run")
    if dry:
        from flora.engines.plan import plan, show

        show(config, plan(config))
        return
    from flora.engines.local import run

    run(config)


def _compare(arguments: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser("flora compare", add_help=False, allow_abbrev=False)
    parser.add_argument("--strategies")
    parser.add_argument("--seeds")
    parser.add_argument("--lr-grid", "--lr_grid")
    own, rest = parser.parse_known_args(arguments)
    if not own.strategies:
        raise _Usage("expected --strategies: flora compare config.yaml --strategies flora,fedit,flora:start=warm --seeds 0,1,2")
    config = _config(rest, "compare")
    from flora.comparison import compare, split_entries

    try:
        seeds = [int(seed) for seed in own.seeds.split(",")] if own.seeds else [config.seed]
        rates = [float(rate) for rate in own.lr_grid.split(",")] if own.lr_grid else []
    except ValueError as error:
        raise _Usage(f"expected numbers, with commas between them: --seeds 0,1,2 --lr-grid 1e-4,1e-3; {error}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("compare: expected one process; torchrun has started several, and each would run all. Compare without "
                          "torchrun, or call flora run under it for each strategy.")
    compare(config, split_entries(own.strategies), seeds, rates)


def _verify(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise _Usage("expected one folder: flora verify runs/demo")
    from flora.verification import show, verify

    show(verify(arguments[0]))


def _partition(arguments: list[str]) -> None:
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser("flora partition", add_help=False, allow_abbrev=False)
    parser.add_argument("--groups", type=int)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--label")
    own, rest = parser.parse_known_args(arguments)
    config = _config(rest, "partition")
    from flora.skew import draw, show, skew

    seen = skew(config, own.groups, own.label)
    if own.plot:
        draw(seen, own.plot)
    show(seen)


def _options(config: "BaseModel") -> object:
    """A config as a plain dataclass for tyro to fill in, so that one place (config.parse) checks the values."""
    import tyro
    from pydantic import BaseModel

    fields = []
    for name, field in type(config).model_fields.items():
        if name in FILE_ONLY:
            continue
        value = getattr(config, name)
        nested = isinstance(value, BaseModel)
        default = _options(value) if nested else value
        kind = type(default) if nested else Annotated[field.annotation, tyro.conf.arg(help=field.description)]
        fields.append((name, kind, dataclasses.field(default_factory=lambda default=default: default)))
    return dataclasses.make_dataclass(type(config).__name__, fields, namespace={"__doc__": type(config).__doc__})()


def _resume(arguments: list[str]) -> None:
    from flora.engines.local import resume

    if len(arguments) != 1:
        raise _Usage("expected one folder: flora resume runs/demo")
    resume(arguments[0])


def _fetch(arguments: list[str]) -> None:
    from flora.data import SOURCES, cached, fetch

    if not arguments:
        for name, source in SOURCES.items():
            print(f"{name:<14} {source.size / 1e6:6.1f} MB  {'fetched' if cached(name) else 'not fetched':<12} {source.licence}")
        return
    for name in arguments:
        print(fetch(name))


def _merge(arguments: list[str]) -> None:
    from flora.shards import main as merge

    merge(arguments)


def _report(arguments: list[str]) -> None:
    from flora.page import main as report

    report(arguments)


def _export(arguments: list[str]) -> None:
    from flora.exporting import main as export

    export(arguments)


def _init(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise _Usage("expected a system and a folder: flora init flower app")
    from flora.starter import init

    print(f"{init(*arguments) / 'README.md'} says how to run it")


def _tune(arguments: list[str]) -> None:
    from flora.tuning import main as tune

    tune(arguments)


def _doctor(arguments: list[str]) -> None:
    from flora.doctor import main as doctor

    doctor()


VERBS = {"run": _run, "resume": _resume, "compare": _compare, "verify": _verify, "report": _report,
         "export": _export, "partition": _partition, "fetch": _fetch, "merge": _merge, "init": _init, "tune": _tune,
         "doctor": _doctor}


def _call(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    if arguments[0] == "--version":
        from flora import __version__
        print(__version__)
        return
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        import difflib
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise _Usage(f"no such verb: {verb}" + (f"; did you mean {near[0]}?" if near else ""))
    if verb not in ("run", "merge", "tune", "export", "report") and rest and rest[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    VERBS[verb](rest)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _call(arguments)
        return 0
    except _Usage as error:
        print(f"flora: {error}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    except FloraError as error:
        if debug:
            raise
        print(f"flora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nflora: stopped. What was written is readable; a run goes on with: flora resume FOLDER, "
              "a comparison with the same command", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

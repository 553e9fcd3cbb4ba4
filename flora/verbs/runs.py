"""Verbs of runs: run, resume, compare, verify, partition."""
import os
import sys
from argparse import Namespace
from pathlib import Path

from flora.errors import ConfigError
from flora.options import Parser, Usage, config_of
from flora.verbs.base import Call

DEMO = Path(__file__).parents[1] / "demo.yaml"


def run(parser: Parser) -> Call:
    """Runs a federated fine-tuning.

    Without a word it runs the demo. Every key of a config is an option; those given change the file's, and lists are words after
    the option.

    flora run config.yaml --lora_r 64 16 4
    flora run --dataset mine.jsonl --num_clients 4 --partition.iid
    """
    parser.add_argument("--dry-run", action="store_true", help="clients, ranks, steps and bytes, without weights or training")
    parser.take_keys(show=True)

    def call(given: Namespace) -> None:
        words = given.words
        if not words:
            words = [str(DEMO)]
            print(f"flora run: the demo, {DEMO}; your own: flora init my-run, then flora run my-run/config.yaml", file=sys.stderr)
        config = config_of(words, "run")
        if given.dry_run:
            from flora.engines.plan import plan, show
            show(config, plan(config))
        else:
            from flora.engines.local import run
            run(config)
    return call


def resume(parser: Parser) -> Call:
    """Goes on with an interrupted run after its last whole round.

    flora resume runs/demo
    """
    parser.add_argument("folder", metavar="FOLDER", help="the run's folder")

    def call(given: Namespace) -> None:
        from flora.engines.local import resume
        resume(given.folder)
    return call


def compare(parser: Parser) -> Call:
    """Runs strategies on equal terms, over several seeds.

    flora compare config.yaml --strategies flora,fedit
    flora compare config.yaml --strategies flora,flora:start=warm --seeds 0,1,2 --num_rounds 10
    """
    parser.add_argument("--strategies", required=True, metavar="A,B[:key=value]", help="strategies, and variants of them")
    parser.add_argument("--seeds", metavar="0,1,2", help="a run of each strategy for every one (default: the config's)")
    parser.add_argument("--lr-grid", "--lr_grid", metavar="1e-4,1e-3", help="run each at these learning rates, show the best")
    parser.take_keys()

    def call(given: Namespace) -> None:
        config = config_of(given.words, "compare")
        from flora.comparison import compare, split_entries
        try:
            seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else [config.seed]
            rates = [float(rate) for rate in given.lr_grid.split(",")] if given.lr_grid else []
        except ValueError as error:
            raise Usage(f"flora compare: expected numbers, with commas between them: --seeds 0,1,2 --lr-grid 1e-4,1e-3; {error}"
                        ) from None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("compare: expected one process; torchrun has started several, and each would run all. Compare "
                              "without torchrun, or call flora run under it for each strategy.")
        compare(config, split_entries(given.strategies), seeds, rates)
    return call


def verify(parser: Parser) -> Call:
    """Recomputes a run's aggregates in fp64 and compares.

    flora verify runs/demo
    """
    parser.add_argument("folder", metavar="FOLDER", help="the run's folder")

    def call(given: Namespace) -> None:
        from flora.verification import show, verify
        show(verify(given.folder))
    return call


def partition(parser: Parser) -> Call:
    """Shows how labels lie over clients and groups of them.

    flora partition config.yaml --groups 8 --plot labels.svg
    """
    parser.add_argument("--groups", type=int, metavar="N", help="make so many near-IID groups")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw bars there")
    parser.add_argument("--label", metavar="COLUMN", help="the column (default: the partition's, else label, else hashed tokens)")
    parser.take_keys()

    def call(given: Namespace) -> None:
        config = config_of(given.words, "partition")
        from flora.skew import draw, label_skew, show
        seen = label_skew(config, given.groups, given.label)
        if given.plot:
            draw(seen, given.plot)
        show(seen)
    return call

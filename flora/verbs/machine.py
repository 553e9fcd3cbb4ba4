"""Verbs that prepare a machine or a folder, or measure: fetch, init, doctor, bench, tune, completion."""
import argparse
from argparse import Namespace

from flora.options import Parser, Usage
from flora.verbs.base import Call


def fetch(parser: Parser) -> Call:
    """Downloads models and data by name, or lists them.

    flora fetch smollm2-135m chitchat
    """
    parser.add_argument("names", nargs="*", metavar="NAME", help="without one: the list")

    def call(given: Namespace) -> None:
        from flora.data import SOURCES, cached, fetch
        for name, source in SOURCES.items() if not given.names else ():
            print(f"{name:<14} {source.size / 1e6:6.1f} MB  {'fetched' if cached(name) else 'not fetched':<12} {source.licence}")
        for name in given.names:
            print(fetch(name))
    return call


def init(parser: Parser) -> Call:
    """Writes a commented config for your data, or an app for Flower.

    A folder alone gets a config.yaml for flora run; after flower, an app of that system.

    flora init my-run --data mine.jsonl
    flora init flower app
    """
    parser.add_argument("kind", nargs="?", default="config", metavar="flower", help="an app for Flower in the place of a config")
    parser.add_argument("folder", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--data", metavar="FILE", help="config: your rows, of which the columns are named")
    parser.add_argument("--model", metavar="NAME", help="config: a fetched name, a folder, a .gguf file, or a name of the hub")

    def call(given: Namespace) -> None:
        from flora.starter import KINDS, init, next_step
        if given.kind == "config" and given.folder in KINDS:
            raise Usage(f"flora init: expected a folder after {given.folder}: flora init {given.folder} my-app")
        print(next_step(given.kind, init(given.kind, given.folder, data=given.data, model=given.model)))
    return call


def tune(parser: Parser) -> Call:
    """Measures which kernel forms and blocks are fastest on this GPU.

    The table is kept, and later runs read it. What it has already is not measured again, so a start that was cut off, or whose
    minutes were over, goes on where it stopped.

    flora tune --minutes 8
    flora tune --shapes 4096x4096 4096x11008
    """
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="linears (default: those of usual models)")
    parser.add_argument("--rows", nargs="+", type=_positive, metavar="M", help="tokens of a batch (default: 8192 512 5120 2048 "
                        "32768)")
    parser.add_argument("--ranks", nargs="+", type=_positive, metavar="R", help="of an adapter, or of each of ten (default: 16 64 "
                        "4 256)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no shape after so many (default: measure all)")

    def call(given: Namespace) -> None:
        from flora.tuning import tune
        tune(given.shapes, given.rows, given.ranks, given.dtype, given.minutes)
    return call


def doctor(parser: Parser) -> Call:
    """Says what works here, what is missing and what that costs.

    flora doctor
    """
    def call(given: Namespace) -> None:
        from flora.doctor import show
        show()
    return call


def bench(parser: Parser) -> Call:
    """Measures the operators against plain PyTorch and the limit.

    Every result is compared with fp64 before it is timed. --show prints the tables that a source tree has in benchmarks/results,
    of whole rounds and of PEFT too.

    flora bench merge --quick
    """
    parser.add_argument("name", nargs="?", metavar="NAME", help="lora_linear or merge (default: both); with --show a table's name")
    parser.add_argument("--quick", action="store_true", help="one shape, fewer repeats: some seconds")
    parser.add_argument("--show", action="store_true", help="print the stored results, and measure nothing")

    def call(given: Namespace) -> None:
        from flora.benchmark import bench, show, stored
        show(stored(given.name) if given.show else bench(given.name, given.quick))
    return call


def completion(parser: Parser) -> Call:
    """Prints a script that completes flora's words in a shell.

    flora completion bash > flora-completion
    . <(flora completion bash)                              in ~/.bashrc
    flora completion fish > ~/.config/fish/completions/flora.fish
    flora completion zsh > ~/.zfunc/_flora                  with fpath+=~/.zfunc before compinit in ~/.zshrc
    """
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))

    def call(given: Namespace) -> None:
        from flora.verbs.completion import completion_script
        print(completion_script(given.shell))
    return call


def _shape(text: str) -> tuple[int, int]:
    """"4096x11008" as (4096, 11008)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected out x in, such as 4096x11008; got {text!r}")
    return int(parts[0]), int(parts[1])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got {text!r}")
    return int(text)

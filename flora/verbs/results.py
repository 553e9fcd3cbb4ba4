"""Verbs of what came of a run, and of models and adapters: eval, chat, export, merge."""
from argparse import Namespace
from pathlib import Path
from typing import Any

from flora.options import Parser
from flora.verbs.base import Call

CLIENT = "a client's own model too, by its name or the beginning of it; again for others"
TARGET = "a finished run; or a model's folder, a fetched model's name, a PEFT folder"


def evaluate(parser: Parser) -> Call:
    """Evaluates a run's model, or any model or PEFT adapter.

    Loss, perplexity, next-token accuracy, and label accuracy or exact match where rows have labels or answers: as a run computes
    them, on the rows that the run held out, or on other rows.

    flora eval runs/demo
    flora eval runs/demo --client client-0 --with-base --json scores.json
    flora eval my-adapter --base smollm2-135m --data mine.jsonl
    """
    parser.add_argument("target", metavar="FOLDER", help=TARGET)
    parser.add_argument("--data", metavar="FILE", help="rows: a file, a folder of files, a fetched name (default: what the run "
                        "held out)")
    parser.add_argument("--rows", type=int, metavar="N", help="only the first N rows of --data")
    parser.add_argument("--client", metavar="NAME", action="append", default=[], help=CLIENT)
    parser.add_argument("--with-base", action="store_true", help="also the model that training began with")
    parser.add_argument("--lm-eval", metavar="FOLDER", action="append", default=[], help="MMLU's parquet files, by "
                        "lm-evaluation-harness")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows of the table there")
    _on(parser)

    def call(given: Namespace) -> None:
        from flora.evaluation import eval_model, show, write
        settings = _settings(given)
        if given.lm_eval:
            settings["evaluate"] = [f"lm_eval:{folder}" for folder in given.lm_eval]
        rows = eval_model(given.target, given.data, given.client, limit=given.rows, with_base=given.with_base, settings=settings)
        show(rows)
        if given.json:
            write(rows, given.json)
    return call


def chat(parser: Parser) -> Call:
    """Asks the base, the trained model and clients side by side.

    One model is in memory, seen through adapters. Without --prompt it talks until Ctrl-D or /quit; /clear begins anew.

    flora chat runs/demo
    flora chat runs/demo --client client-0 --prompt "What is a good name for a cat?"
    """
    parser.add_argument("target", metavar="FOLDER", help=TARGET)
    parser.add_argument("--client", metavar="NAME", action="append", default=[], help=CLIENT)
    parser.add_argument("--prompt", metavar="TEXT", help="one question, and the end")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at a temperature")
    _on(parser)

    def call(given: Namespace) -> None:
        from flora.conversation import Sampling, chat, converse, show
        sampling = Sampling(given.max_new_tokens, given.temperature, given.seed)
        if given.prompt is None:
            converse(given.target, given.client, sampling, _settings(given))
        else:
            show(chat(given.target, given.prompt, given.client, sampling, _settings(given)))
    return call


def report(parser: Parser) -> Call:
    """Writes one HTML page of runs: plots and tables.

    It asks the network for nothing. A folder of flora compare stands for its runs; runs that differ by their seed are one line.

    flora report runs/demo
    flora report runs/a runs/b --out both.html
    """
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run's folder, or one of flora compare")
    parser.add_argument("--out", metavar="FILE.html", help="where to (default: RUN/report.html; of several, ./report.html)")

    def call(given: Namespace) -> None:
        from flora.page import write_report
        print(write_report(given.folders, given.out))
    return call


def export(parser: Parser) -> Call:
    """Writes the result of a finished run, with a model card.

    flora export runs/demo --out demo-model
    """
    parser.add_argument("folder", metavar="FOLDER", help="the run's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--client", metavar="NAME", help="one client's last adapter in the place of the global model; the "
                        "beginning of its name is enough")

    def call(given: Namespace) -> None:
        from flora.exporting import export
        print(export(given.folder, given.out, given.client))
    return call


def merge(parser: Parser) -> Call:
    """Writes PEFT adapters of any ranks into a model's folder.

    Shard by shard, in the memory of the largest shard and the adapters. Each weight is rounded once.

    flora merge smollm2-135m alice bob --out merged
    flora merge smollm2-135m adapters/alice adapters/bob --weights 0.7 0.3 --out merged
    """
    parser.add_argument("base", metavar="BASE", help="a folder with config.json and safetensors, a fetched name, a name of the hub")
    parser.add_argument("adapters", nargs="+", metavar="FOLDER", help="what PEFT wrote; ranks and alphas may differ")
    parser.add_argument("--weights", nargs="+", type=float, metavar="P", help="p_k of each adapter, as they are (default: 1 / K)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest", help="of 16-bit weights")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument("--quiet", action="store_true", help="no progress display")

    def call(given: Namespace) -> None:
        from flora.shards import merge_files
        where = merge_files(given.base, given.adapters, given.out, given.weights, rounding=given.rounding, seed=given.seed,
                            overwrite=given.overwrite, quiet=given.quiet)
        count = len(given.adapters)
        weights = " ".join(f"{one:.6g}" for one in given.weights or [1 / count] * count)
        print(f"merged {count} adapters, weights {weights}, into {where}")
    return call


def _on(parser: Parser) -> None:
    """The options of whatever loads a model."""
    parser.add_argument("--base", metavar="NAME", help="a PEFT folder's base (default: the one that it names)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the run's)")


def _settings(given: Namespace) -> dict[str, Any]:
    """What these options change of a config's keys."""
    named = {"model_name_or_path": given.base, "device": given.device, "dtype": given.dtype}
    return {key: value for key, value in named.items() if value is not None}

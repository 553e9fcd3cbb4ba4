"""Re-runs the experiments of a paper on a model and data that can be had: python -m benchmarks.papers.run --scale cpu [NAME ...]

Each experiment is a file in benchmarks/papers/flora: what is compared, and the config, with what differs by scale. The runs are
`flora compare`'s (finished ones are kept, unfinished ones go on); what came out goes to papers/ in the folder of results.
"""
import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

import flora
from benchmarks.measure import folder
from flora.config import parse
from flora.environment import environment

HERE = Path(__file__).parent


def experiments(paper: str) -> list[str]:
    """Names of a paper's experiments."""
    return sorted(path.stem for path in (HERE / paper).glob("*.yaml") if path.stem != "common")


def read(paper: str, name: str, scale: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the experiment's own keys, the config of its runs): common, then the experiment's; for every scale, then for this one."""
    own = yaml.safe_load((HERE / paper / f"{name}.yaml").read_text())
    common = yaml.safe_load((HERE / paper / "common.yaml").read_text())
    parts = (common["config"], common.get(scale), own.get("config"), own.get(scale))
    settings = {key: value for part in parts for key, value in (part or {}).items()}
    return own, settings


def _without_folders(found: dict[str, Any]) -> dict[str, Any]:
    """Where runs lay on the machine that made them is of no use elsewhere."""
    return {key: value for key, value in found.items() if key != "folder"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="experiments; all where none is named")
    parser.add_argument("--paper", default="flora", help="a folder of benchmarks/papers")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the experiment's")
    parser.add_argument("--strategies", nargs="+", help="some of the experiment's entries")
    parser.add_argument("--output_dir", default="runs/papers")
    arguments = parser.parse_args()
    for name in arguments.names or experiments(arguments.paper):
        own, settings = read(arguments.paper, name, arguments.scale)
        what, where = own["compare"], Path(arguments.output_dir) / arguments.paper / arguments.scale / name
        strategies, seeds = arguments.strategies or what["strategies"], arguments.seeds or what["seeds"]
        print(f"{own['title']}: {len(strategies)} entries, seeds {seeds}", flush=True)
        flora.compare(parse({**settings, "output_dir": str(where)}, name), strategies, seeds, what.get("learning_rates", ()))
        if strategies != what["strategies"] or seeds != what["seeds"]:
            continue                                            # a part: nothing is published from it
        out = folder() / "papers"
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads((where / "compare.json").read_text(), object_hook=_without_folders)
        record = {"experiment": name, "paper": arguments.paper, "scale": arguments.scale, "title": own["title"],
                  "published": own.get("published"), "config": settings, "environment": environment(), "compare": found}
        (out / f"{arguments.paper}-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.copyfile(where / "compare.svg", out / f"{arguments.paper}-{name}.svg")


if __name__ == "__main__":
    main()

"""Run folders for the tests of the page: tiny runs, and one whose clients' names try what a name could try."""
import json
from pathlib import Path

from tiny import TARGETS, save_model, write_rows

import flora

HOSTILE = ("</script><script>window.pwned = 1</script>", "<img src=x onerror='window.pwned = 2'>",
           "<a href=\"javascript:window.pwned = 3\">%{y}<b>bold</b></a>", "' onmouseover='window.pwned = 4")


def settings(place, name, **changes):
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 4, "num_rounds": 2,
            "lora_r": [8, 4, 4, 2], "max_steps": 2, "learning_rate": 1e-2, "eval_rows_per_client": 3, "server_eval_rows": 8,
            "target_modules": list(TARGETS), "device": "cpu", "quiet": True, "keep_rounds": 2,
            "partition": {"dirichlet_alpha": 1.0, "label": "mood"}, "communication_budget_mb": 0.5,
            "output_dir": str(place / name), **changes}


def make(place, names=("one", "two", "again")):
    """The folders one, two (zeropad), again (one with another seed) in a place with a model and rows."""
    save_model(place / "model")
    write_rows(place / "rows.jsonl")
    changes = {"one": {}, "two": {"strategy": "zeropad"}, "again": {"seed": 1}}
    return {name: flora.run(settings(place, name, **more)) for name, more in changes.items() if name in names}


def make_hostile(place):
    """A run whose clients, and a reason for which one was left out, are called as no honest one is; place has a model."""
    rows = [json.loads(line) for line in write_rows(place / "plain.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["who"] = HOSTILE[number % len(HOSTILE)]
    path = Path(place / "hostile.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = flora.run(settings(place, "a <b>run<b>", dataset=str(path), partition={"by": "who"}, num_rounds=1))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "failure", "round": 0, "client": HOSTILE[0], "reason": HOSTILE[1]}) + "\n")
    return folder

"""`flora init DIR`: a config with comments for one's own data; `flora init flower DIR`: an app of Flower that runs flora."""
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from flora.data import load_rows
from flora.errors import ConfigError
from flora.files import staged

KINDS = ("flower",)
CONFIG = '''\
# A federated fine-tuning: flora run @file@
# Every key is an option too: flora run @file@ --num_rounds 1. All keys: flora run --help.

model_name_or_path: @model@
# a fetched name (flora fetch lists them), a folder, a .gguf file, or a name of the hub

dataset: @data@
# .json, .jsonl, .parquet or .csv, or a folder of them; rows with the columns prompt and completion, or messages, or
# conversations (ShareGPT), or instruction and output (Alpaca), or question and answer

# How rows are dealt to clients: one of these.
partition: {@partition@}
#  {by: COLUMN}                             a client for each value of a column: those with the most rows
#  {iid: true}                              evenly, at random
#  {dirichlet_alpha: 0.3, label: COLUMN}    skewed by the values of a column
@columns@
num_clients: 4
num_rounds: 3

# A rank a client, as it can afford, or one for all. scale = alpha / rank; 2r: alpha is twice the rank.
lora_r: [32, 16, 8, 4]
lora_alpha: 2r
strategy: flora            # exact, for any ranks; fedit, hetlora, flexlora, ...: flora compare sets them side by side

# A client's training in a round. max_steps or num_train_epochs.
learning_rate: 3.0e-4
max_steps: 8
per_device_train_batch_size: 2
max_length: 256            # tokens; longer rows lose the start of their prompt first

# Rows that nobody trains on: a fifth of a client's and of all rows at most.
eval_rows_per_client: 8
server_eval_rows: 32

seed: 0
output_dir: @output@
'''

PYPROJECT = '''\
[project]
name = "@name@"
version = "0.1.0"
description = "Federated LoRA fine-tuning with flora, on Flower"
license = "Apache-2.0"
dependencies = []                       # nothing is installed at a run: flora is on the nodes, pip install 'flora[flower]'

[tool.flwr.app]
publisher = "flora"

[tool.flwr.app.components]
serverapp = "flora_app:server_app"
clientapp = "flora_app:client_app"

[tool.flwr.app.config]                  # a run's keys: docs/config.md; a list is "64,16,4"
model_name_or_path = "smollm2-135m"     # on every node: flora fetch smollm2-135m chitchat
dataset = "chitchat"
partition.by = "sender"
num_clients = 4
num_rounds = 3
fraction_train = 1.0
min_clients = 2                         # answers without which a round stops the run, at a checkpoint
strategy = "flora"
lora_r = "32,16,8,4"                    # or each node's own: --node-config 'lora-rank=8'
lora_alpha = "2r"
learning_rate = 5e-4
max_steps = 8
per_device_train_batch_size = 2
max_length = 128
eval_rows_per_client = 4
server_eval_rows = 16
seed = 0
device = "auto"
output_dir = "@output@"
flower.resume = false                   # true: go on after the last whole round in output_dir
flower.server_model = false             # true: the server evaluates, and writes the merged model
flower.round_timeout = 3600.0
flower.wait_seconds = 120.0
'''

APP = '''\
"""A server and a client of flora on Flower; pyproject.toml says what they do."""
from flora.engines.flower import client_app, server_app

__all__ = ["client_app", "server_app"]
'''

README = '''\
# @name@

Federated LoRA fine-tuning with flora, on Flower. The keys of `[tool.flwr.app.config]` in pyproject.toml are those of `flora run`.

```
bash simulate.sh
```

simulates four nodes on this machine, each process with the model; `bash simulate.sh 4 --run-config 'num_rounds=1'` changes keys.
What came of it is in @output@. It is `flwr run . --stream --federation-config 'num-supernodes=4 client-resources-num-cpus=1'`
with a SuperLink that ends with it; alone, that command leaves one running.

Nodes of a real deployment need flora (`pip install 'flora[flower]'`), the model, and each a place in the run or rows of its own:

```
flower-supernode --superlink HOST:PORT --root-certificates ca.crt \\
    --node-config 'partition-id=0 lora-rank=16 dataset="/data/mine.jsonl"'
```

flora's docs/flower.md has the rest: TLS and keys of nodes, what happens to a node that was away, how to resume.
'''

SIMULATE = '''\
#!/usr/bin/env bash
# Simulates the nodes of this app on this machine, and ends what it starts: bash simulate.sh [NODES [options of flwr run]]
# PORT (39191) is used; CPUS (1) are those of a node: with fewer than it has, nodes take turns.
set -euo pipefail
app=$(cd "$(dirname "$0")" && pwd)
nodes=${1:-4}
shift || true
port=${PORT:-39191}
home=$(mktemp -d)
export FLWR_HOME=$home FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
printf '[superlink]\\ndefault = "simulation"\\n\\n[superlink.simulation]\\naddress = "127.0.0.1:%s"\\ninsecure = true\\n' "$port" \\
    > "$home/config.toml"

started=()
tree() { local child; for child in $(pgrep -P "$1"); do echo "$child"; tree "$child"; done; }
stop() {                                    # what was started, and what that has started, by process id
    trap - EXIT INT TERM
    local pid all alive
    all=$(for pid in "${started[@]}"; do echo "$pid"; tree "$pid"; done)
    kill -TERM "${started[@]}" 2>/dev/null || true
    for _ in $(seq 60); do
        alive=$(for pid in $all; do if kill -0 "$pid" 2>/dev/null; then echo "$pid"; fi; done)
        [ -z "$alive" ] && break
        sleep 0.2
    done
    for pid in $alive; do kill -KILL "$pid" 2>/dev/null || true; done
    rm -rf "$home"
}
trap stop EXIT
trap 'exit 130' INT TERM

flower-superlink --insecure --simulation --port "$port" > "$home/link.log" 2>&1 &
started+=($!)
until grep -q 'Uvicorn running\\|startup complete' "$home/link.log"; do
    kill -0 "${started[0]}" 2>/dev/null || { cat "$home/link.log" >&2; exit 1; }
    sleep 0.2
done
flwr run "$app" simulation --stream --federation-config "num-supernodes=$nodes client-resources-num-cpus=${CPUS:-1}" "$@" \\
    > >(tee "$home/run.log") 2>&1 &
started+=($!)
wait $!
sleep 0.5
grep -q 'the run is in' "$home/run.log" || { echo "the run has failed" >&2; exit 1; }
'''


def init(kind: str, folder: str | Path, *, data: str | Path | None = None, model: str | None = None) -> Path:
    """Writes what a run starts from into a new folder, and returns it. kind: "config" (config.yaml, for `flora run`) or "flower"
    (an app). data, model: of a config; rows are read, and their columns named (None: chitchat, by sender, on smollm2-135m).

    Raises ConfigError for another kind, or a folder that is not empty; DataError for data that cannot be read.
    """
    if kind not in ("config", *KINDS):
        raise ConfigError(f"expected flower, or a folder alone; got {kind!r}. flora init DIR writes a config, flora init flower "
                          "DIR an app for Flower.")
    if kind != "config" and (data or model):
        raise ConfigError("expected --data and --model with a config alone; got an app, whose pyproject.toml has these keys. Leave "
                          "them out.")
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"expected a new or empty folder; got {folder}, which holds something. Choose another.")
    if kind == "config":
        return _write(folder, {"config.yaml": CONFIG}, _config_words(folder, data, model))
    words = {"name": re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-") or "flora-app", "output": str(folder / "run")}
    return _write(folder, {"pyproject.toml": PYPROJECT, "flora_app.py": APP, "README.md": README, "simulate.sh": SIMULATE}, words)


def next_step(kind: str, folder: Path) -> str:
    """What to do with what `init` has written."""
    if kind == "config":
        return f"flora run {shlex.quote(str(folder / 'config.yaml'))}"
    return f"{folder / 'README.md'} says how to run it"


def _config_words(folder: Path, data: str | Path | None, model: str | None) -> dict[str, str]:
    """A path is written out whole: a run may be started anywhere. JSON's strings are YAML's."""
    words = {"file": str(folder / "config.yaml"), "model": _name(model or "smollm2-135m"),
             "output": json.dumps(str(folder / "run"))}
    if data is None:
        return words | {"data": "chitchat             # who wrote to whom; put your own file here", "partition": "by: sender",
                        "columns": ""}
    found: dict[str, set[str]] = {}
    for row in load_rows(data):
        for name, value in row.items():
            if isinstance(value, (str, int)) and name not in ("prompt", "completion"):
                found.setdefault(name, set()).add(str(value))
    said = ", ".join(f"{' '.join(name.split())} ({len(values)} values)" for name, values in found.items())
    return words | {"data": _name(data), "partition": "iid: true", "columns": f"#  your columns: {said or 'only the text'}\n"}


def _name(given: str | Path) -> str:
    """A name, or the whole path of what is there."""
    path = Path(given).expanduser()
    return json.dumps(str(path.resolve()) if path.exists() else str(given))


def _write(folder: Path, files: Mapping[str, str], words: Mapping[str, str]) -> Path:
    with staged(folder) as stage:
        for name, text in files.items():
            for word, value in words.items():
                text = text.replace(f"@{word}@", value)
            (stage / name).write_text(text, encoding="utf-8")
    return folder

"""What an engine adds to a round of flora's own, and the bytes that it moves: Flower and NVFlare, with their processes.

    make bench-engines
    .venv-engines/bin/python -m benchmarks.bench_engines [--megabytes 80 800] [--repeats 2] [--rounds 4] [--engines ENGINE ...]

Four clients of one rank; the stack of their adapters, which every client is sent, has so many megabytes in fp32. The model has
the 210 linears of SmolLM2-135M, random, and a vocabulary of 512 words; a client trains one step on one sequence of a few words, so
a round is its messages, merges and files. Every engine runs the same config from a process of its own, the engines taking turns; a
round's time is the time between two rows of the server in metrics.jsonl, without the first and the last round (which is
evaluated), so it has everything: processes, serialisation, copies, checkpoints. x peer: times the local engine that trains one
client after another, as clients of their own do.

Where a network namespace can be made (Linux, `unshare -n`), a run gets one, and its loopback counts the bytes on the wire of all
rounds: every hop, acknowledgements too.
"""
import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import publish
from benchmarks.shapes import SMOLLM2_135M
from flora.speed import rows_of

ROOT = Path(__file__).resolve().parents[1]
BLOCKS, CLIENTS = 30, 4
LOCAL = "local, one by one"
ONE_BY_ONE = """
import sys, flora
from flora import cohort
cohort.MOST_CLIENTS = int(sys.argv[2]) or cohort.MOST_CLIENTS
flora.run(sys.argv[1])
"""
SIMULATOR = """
import sys, yaml
from pathlib import Path
from nvflare.recipe.sim_env import SimEnv
from flora.engines.nvflare import flora_recipe
recipe = flora_recipe(yaml.safe_load(Path(sys.argv[1]).read_text()), "bench")
recipe.execute(SimEnv(clients=recipe.sites, workspace_root=sys.argv[2]))
"""
Command = Callable[[Path, dict[str, Any]], list[str]]


def rank_for(megabytes: float) -> int:
    """The rank of each client whose stack has so many megabytes of fp32."""
    numbers = BLOCKS * sum(out + inn for _, out, inn in SMOLLM2_135M)
    return max(1, round(megabytes * 1e6 / 4 / numbers / CLIENTS))


def files(place: Path) -> None:
    """The model and the rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import save_model, write_rows
    save_model(place / "model", vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=BLOCKS,
               num_attention_heads=9, num_key_value_heads=3, initializer_range=0.02)
    write_rows(place / "rows.jsonl", 40)


def config(place: Path, folder: Path, megabytes: float, rounds: int) -> dict[str, Any]:
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": CLIENTS,
            "num_rounds": rounds, "lora_r": rank_for(megabytes), "lora_alpha": "2r", "max_steps": 1, "learning_rate": 1e-4,
            "per_device_train_batch_size": 1, "eval_rows_per_client": 1, "server_eval_rows": 4, "eval_every": rounds,
            "save_model": False, "quiet": True, "device": "cpu", "output_dir": str(folder / "run")}


def saved(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def local(most: int) -> Command:
    return lambda folder, values: [sys.executable, "-c", ONE_BY_ONE, saved(folder, values), str(most)]


def app(folder: Path, values: dict[str, Any]) -> str:
    """An app of `flora init flower` with these keys."""
    from flora.starter import init
    made = init("flower", folder / "app")
    head, section, _ = (made / "pyproject.toml").read_text().partition("[tool.flwr.app.config]")
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {**values, "flower.wait_seconds": 120.0}.items())
    (made / "pyproject.toml").write_text(f"{head}{section}\n{keys}")
    return str(made)


def flower_simulated(folder: Path, values: dict[str, Any]) -> list[str]:
    return ["bash", f"{app(folder, values)}/simulate.sh", str(CLIENTS)]


def flower_deployed(folder: Path, values: dict[str, Any]) -> list[str]:
    return ["bash", str(ROOT / "examples/flower_tls.sh"), app(folder, values)]


def nvflare_simulated(folder: Path, values: dict[str, Any]) -> list[str]:
    return [sys.executable, "-c", SIMULATOR, saved(folder, values), str(folder / "workspace")]


ENGINES: dict[str, Command] = {
    LOCAL: local(1), "local, one batch": local(0), "Flower, Ray": flower_simulated, "Flower, SuperLink, TLS": flower_deployed,
    "NVFlare, simulator": nvflare_simulated}


def counted(command: list[str], counters: Path) -> list[str]:
    """This command in a network namespace of its own, which leaves its counters; the command alone where there is none."""
    inside = 'ip link set lo up && "$@"; code=$?; cat /proc/net/dev > "$0"; exit $code'
    able = shutil.which("unshare") and shutil.which("ip") and subprocess.run(
        ["unshare", "-n", "true"], capture_output=True).returncode == 0
    return ["unshare", "-n", "sh", "-c", inside, str(counters), *command] if able else command


def server_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of whole rounds that the file has by now."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == "server" and row["rounds_done"]]


def watched(name: str, place: Path, megabytes: float, rounds: int) -> tuple[list[float], dict[str, float | None]]:
    """Seconds of the inner rounds of one run, and its bytes. Leaves with its output where the run fails."""
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as given:
        folder, seen = Path(given), []
        values = config(place, folder, megabytes, rounds)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "FLORA_CACHE": str(folder / "cache"), "NODES": str(CLIENTS),
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CPUS": str(os.cpu_count()),
               "WORK": str(folder / "work")}
        (folder / "work").mkdir()
        with (folder / "log").open("w+") as log:
            command = counted(ENGINES[name](folder, values), folder / "counters")
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder)
            metrics = folder / "run/metrics.jsonl"
            while process.poll() is None:
                seen += [time.perf_counter()] * (len(server_rows(metrics)) - len(seen))
                time.sleep(0.02)
            rows = server_rows(metrics)
            if process.returncode or len(rows) < rounds or len(seen) < rounds - 1:
                log.seek(0)
                sys.exit(f"{name}: expected {rounds} rounds; got {len(rows)}, exit code {process.returncode}\n{log.read()[-4000:]}")
        told = {"up_mb": rows[1]["bytes_up"] / 1e6, "down_mb": rows[1]["bytes_down"] / 1e6,
                "told_mb": sum(row["bytes_up"] + row["bytes_down"] for row in rows) / 1e6, "wire_mb": None}
        if (folder / "counters").exists():
            told["wire_mb"] = int(re.search(r"lo:\s*(\d+)", (folder / "counters").read_text())[1]) / 1e6
        return [after - before for before, after in itertools.pairwise(seen[:rounds - 1])], told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=float, default=[80, 800])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="of a run; all but the first and the last are measured")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options = parser.parse_args()
    names = list(dict.fromkeys([LOCAL, *options.engines]))
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as given:
        place = Path(given)
        files(place)
        for megabytes in options.megabytes:
            seconds: dict[str, list[float]] = {name: [] for name in names}
            told: dict[str, dict[str, float | None]] = {}
            for number in range(options.repeats):
                for name in names:
                    found, told[name] = watched(name, place, megabytes, options.rounds)
                    seconds[name] += found
                    print(f"{megabytes:g} MB, run {number}: {name}: {', '.join(f'{s:.1f}' for s in found)} s a round", flush=True)
            title = f"{CLIENTS} clients of rank {rank_for(megabytes)}, a stack of {megabytes:g} MB, a round"
            own = statistics.median(seconds[LOCAL])
            publish("engines", [row | told[row["variant"]] | {"megabytes": megabytes, "added_ms": row["ms"] - own * 1e3}
                                for row in rows_of(title, seconds, LOCAL)])


if __name__ == "__main__":
    main()

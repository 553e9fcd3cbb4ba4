"""Jobs of NVFlare's simulator: a server and a process for each site, half a minute each."""
import json

import pytest
import yaml
from tiny import TARGETS, python

pytest.importorskip("nvflare", reason="nvflare is not installed, so not tested: the NVFlare engine. `make test-engines` tests it")

import flora
from flora import cohort
from flora.report import read_metrics

pytestmark = pytest.mark.slow

JOB = """
import sys
from nvflare.recipe.sim_env import SimEnv
from flora.engines.nvflare import flora_recipe
recipe = flora_recipe(sys.argv[1], resume=sys.argv[3] == "resume", script=sys.argv[4] if len(sys.argv) > 4 else None)
recipe.execute(SimEnv(clients=recipe.sites, workspace_root=sys.argv[2]))
"""
CLIENT = """
import shutil
from pathlib import Path
import numpy as np
from flora.engines.nvflare import client, client_loop
from flora.engines.party import Base, Party

send, answer, rounds = client.flare.send, Party.answer, []

def spoiled(model):
    if client.flare.get_site_name() == "site-2" and model.meta["flora"]["have"] == 1:
        model.params = {"flora": np.zeros(50, np.uint8)}
    send(model)

def forgets(self, *given):
    rounds.append(given)
    if client.flare.get_site_name() == "site-1" and len(rounds) == 3:
        self.base = Base(self.config, here / "empty")
    return answer(self, *given)

here = Path(__file__).parent
client.flare.send, Party.answer = spoiled, forgets
client_loop(here / "flora_job.yaml")
"""
ALLOWED = {"format_version": 2, "class_allow_list": ["nvflare.", "flora.engines.nvflare."]}


def keys(place, folder, **changes):
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 3, "num_rounds": 3,
            "lora_r": [8, 4, 2], "lora_alpha": [16, 4, 8], "max_steps": 3, "learning_rate": 1e-2, "eval_rows_per_client": 3,
            "server_eval_rows": 8, "target_modules": list(TARGETS), "quiet": True, "device": "cpu", "keep_rounds": 9,
            "output_dir": str(folder), **changes}


def simulated(folder, values, how="new", script=None):
    """A job in the simulator, in processes of its own."""
    (folder / "flora_job.yaml").write_text(yaml.safe_dump(values))
    (folder / "job.py").write_text(JOB)
    given = [folder / "job.py", folder / "flora_job.yaml", folder / "simulated", how, *([script] if script else [])]
    return python(*map(str, given), timeout=280)


def bits(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "rounds").rglob("*.safetensors")}


def test_a_job_that_stops_is_resumed_and_gives_the_bits_of_a_local_run(place, tmp_path, monkeypatch):
    """Round 1 has too few answers, as one cannot be read."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    values = keys(place, tmp_path / "out", min_clients=3, num_rounds=2)
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "simulated/flora/local").mkdir(parents=True)
    (tmp_path / "simulated/flora/local/resources.json").write_text(json.dumps(ALLOWED))
    done = simulated(tmp_path, values, script=tmp_path / "client.py")
    assert "expected answers of at least 3 clients (min_clients); got 2. client-1: " in done.stdout + done.stderr
    assert json.loads((tmp_path / "out/run.json").read_text()) == {"state": "failed", "rounds_done": 1}
    done = simulated(tmp_path, values, "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    local = flora.run({**values, "output_dir": str(tmp_path / "local")})
    assert bits(tmp_path / "out") == bits(local) and len(bits(local)) == 8


def test_a_wrong_answer_is_refused_and_a_base_that_was_lost_is_made_good_in_the_round(place, tmp_path, monkeypatch):
    """The job carries no code: the sites have the script, and their policy lists flora's classes; without that they are refused."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    values = keys(place, tmp_path / "out")
    (tmp_path / "client.py").write_text(CLIENT)
    done = simulated(tmp_path, values, script=tmp_path / "client.py")
    assert "'flora.engines.nvflare.parts.FloraFedAvg'" in done.stdout + done.stderr and not (tmp_path / "out/run.json").exists()
    (tmp_path / "simulated/flora/local/resources.json").write_text(json.dumps(ALLOWED))
    done = simulated(tmp_path, values, script=tmp_path / "client.py")
    rows = read_metrics(tmp_path / "out")
    found = [(row["round"], row["client"], row["reason"]) for row in rows if row["kind"] == "failure"]
    assert [one[:2] for one in found] == [(1, "client-1")] and "safetensors" in found[0][2], done.stderr[-3000:]
    assert [row["client"] for row in rows if row["kind"] == "client" and row["round"] == 2] == ["client-0", "client-1", "client-2"]
    assert sorted((tmp_path / "empty").rglob("*.safetensors"))                # what site-1 was sent again

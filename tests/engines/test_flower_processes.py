"""flora on Flower with its processes: an app of `flora init flower`, simulated on Ray, and deployed with TLS and node keys."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

pytest.importorskip("flwr", reason="flwr is not installed, so not tested: Flower's processes. `make test-engines` tests them")

from runs import bits

from flora.cli import main
from flora.engines.flower.records import settings
from flora.errors import ConfigError
from flora.formats import load_peft
from flora.report import read_metrics
from flora.starter import init

RUN = {"num_rounds": 2, "max_steps": 3, "learning_rate": 1e-2, "device": "cpu", "eval_rows_per_client": 3, "server_eval_rows": 8}


def app_of(tmp_path, place, **changes):
    """An app, the keys in which its run differs as a TOML file, and those keys."""
    folder = init("flower", tmp_path / "app")
    values = {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "partition.by": "who",
              "output_dir": str(tmp_path / "run"), **RUN, **changes}
    (tmp_path / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return folder, tmp_path / "run.toml", values


def whole(folder, values):
    """The keys of an app with those of its run over them, as a config of flora's."""
    import tomllib

    own = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {key: value for key, value in own.items() if not isinstance(value, dict)}
    return settings({**flat, **values, "keep_rounds": 1, "quiet": True})


def call(tmp_path, *command, **variables):
    """Runs a script to its end; its output, and the processes of Flower's and Ray's that are left of it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FLORA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, check=False)
    return done, [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path) in environment_of(pid)]


def environment_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_init_writes_an_app_and_overwrites_nothing(tmp_path, capsys):
    assert main(["init", "flower", str(tmp_path / "My App")]) == 0 and "README.md" in capsys.readouterr().out
    folder = tmp_path / "My App"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "flora_app.py", "pyproject.toml", "simulate.sh"]
    config, own = whole(folder, {"partition.by": "sender"})
    assert config.ranks() == [32, 16, 8, 4] and config.output_dir == str(folder / "run") and own.wait_seconds == 120
    assert 'name = "my-app"' in (folder / "pyproject.toml").read_text() and "@" not in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match="holds something"):
        init("flower", folder)
    with pytest.raises(ConfigError, match="expected flower"):
        init("flour", tmp_path / "other")
    assert main(["init", "flower"]) == 2


@pytest.mark.slow
def test_an_app_is_simulated_on_ray_with_the_bits_of_a_local_run(place, tmp_path, monkeypatch):
    """One command; every process that it starts ends with it."""
    from flora import cohort
    folder, toml, values = app_of(tmp_path, place, lora_r="8,4,2,1")
    done, left = call(tmp_path, "bash", str(folder / "simulate.sh"), "4", "--run-config", str(toml), PORT="39291")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert left == []
    monkeypatch.setattr(cohort, "MOST_CLIENTS", 1)
    config, _ = whole(folder, values)
    local = locally_of(config, tmp_path / "local")
    seen = bits(tmp_path / "run")
    assert len(seen) == 5 and seen == bits(local)


def locally_of(config, folder):
    import flora
    return flora.run(config.model_copy(update={"output_dir": str(folder)}))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("openssl") or not shutil.which("ssh-keygen"), reason="no openssl or no ssh-keygen, so not "
                    "tested: a SuperLink and SuperNodes with TLS and keys")
def test_a_superlink_and_two_supernodes_with_tls_and_keys_run_it(place, tmp_path):
    """A client's process ends after every message: its base is replayed from the disk, and no merge is sent twice."""
    folder, toml, _ = app_of(tmp_path, place, num_clients=2, lora_r="8,4", num_rounds=3, **{"flower.wait_seconds": 60.0})
    rows = tmp_path / "rows2.jsonl"
    rows.write_text("".join(line for line in (place / "rows.jsonl").read_text().splitlines(True) if re.search('"p[01]"', line)))
    toml.write_text(toml.read_text().replace(str(place / "rows.jsonl"), str(rows)))
    done, left = call(tmp_path, "bash", str(ROOT / "examples" / "flower_tls.sh"), str(folder), str(toml), PORT="19191",
                      WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert left == [] and "https" in (tmp_path / "work" / "superlink.log").read_text()
    served = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "server"]
    assert [row["clients"] for row in served] == [2, 2, 2] and served[1]["bytes_down"] == served[2]["bytes_down"]
    assert not [row for row in read_metrics(tmp_path / "run") if row["kind"] == "failure"]
    assert {a.rank for a in load_peft(tmp_path / "run" / "adapter").values()} == {36}

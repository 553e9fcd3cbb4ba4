"""The sdist and both wheels: what is in them, and that each runs alone, outside the source tree, with the kernels it has."""
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
import yaml
from tiny import ROOT, TARGETS, save_model, tracked, write_rows

import flora

NAME = f"flora-{flora.__version__}"
PURE = f"{NAME}-py3-none-any.whl"
# What runs lora_linear on a CPU, what doctor says of it, and how many .so are in the wheel.
KINDS = {"pure": ("reference", 0), "native": ("native", 2)}
RUN = """
import json, pathlib, sys
import flora, flora.ops, flora.nn, flora.messages, flora.integrations.peft, flora.engines.local, flora.strategies
from flora import kernels
import torch
a = flora.Adapter(torch.ones(2, 3), torch.ones(4, 2), 1.0)
y = flora.ops.lora_linear(torch.ones(5, 3), torch.zeros(4, 3), a.A, a.B, a.scale)
assert bool((y == 6).all())
backend = {c.operator: c.backend for c in kernels.table() if c.device == "cpu"}
print(json.dumps([str(pathlib.Path(flora.__file__).parent), flora.__version__, backend["lora_linear"], backend["merge_"]]))
"""


def call(*command, cwd, **environment):
    """Output of a process that sees no source tree."""
    unseen = ("PYTHONPATH", "TRITON_INTERPRET", "FLORA_REQUIRE_NATIVE")
    kept = {key: value for key, value in os.environ.items() if key not in unseen}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, timeout=600, check=False,
                          env={**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160", **environment})
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that `make wheels` fills: an sdist of the tracked files, both wheels from it; the compilers are at hand."""
    folder = tmp_path_factory.mktemp("wheels")
    for path in tracked("flora/*", "csrc/*", "docs/*", "examples/*", "*"):
        copy = folder / "tree" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=folder / "tree")
    sdist = folder / f"{NAME}.tar.gz"
    wheel = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder,
             sdist)
    call(*wheel, cwd=folder, FLORA_NATIVE="0")
    call(*wheel, cwd=folder, FLORA_REQUIRE_NATIVE="1")
    return folder


def wheel_of(dist, kind):
    found = sorted(path.name for path in dist.glob("*.whl"))
    assert len(found) == 2 and PURE in found, found
    return dist / (PURE if kind == "pure" else next(name for name in found if name != PURE))


@pytest.fixture(scope="module", params=KINDS)
def installed(request, dist, tmp_path_factory):
    """(kind, python, flora's command, an empty folder) of a fresh environment with one wheel over what this one has installed."""
    place = tmp_path_factory.mktemp(request.param)
    call(sys.executable, "-m", "venv", "--without-pip", place / "env", cwd=place)
    python = place / "env" / "bin" / "python"
    inside = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
         wheel_of(dist, request.param), cwd=place)
    with open(f"{inside}/over.pth", "w", encoding="utf-8") as file:      # after the environment's own: its flora comes first
        file.write(sysconfig.get_path("purelib") + "\n")
    (place / "work").mkdir()
    return request.param, python, place / "env" / "bin" / "flora", place / "work"


@pytest.mark.slow
def test_the_sdist_has_what_a_build_needs_and_nothing_that_was_built(dist):
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in tracked("csrc/*", "flora/*")}
    assert len(sources) > 100 and sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("tests", "benchmarks", "build"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_wheel_has_the_package_and_its_data(dist, kind):
    path = wheel_of(dist, kind)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    ours = {str(path.relative_to(ROOT)) for path in tracked("flora/*")}
    assert {"flora/py.typed", "flora/demo.yaml"} <= ours <= names
    rest = {name for name in names - ours if ".dist-info/" not in name}
    assert len(rest) == KINDS[kind][1] and all(name.startswith("flora/_") and name.endswith(".so") for name in rest), rest
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert f"Version: {flora.__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    assert kind == "pure" or "-cp310-abi3-" in path.name


@pytest.mark.slow
def test_a_wheel_runs_alone_with_its_own_kernels(installed):
    kind, python, command, work = installed
    folder, version, linear, merge = json.loads(call(python, "-c", RUN, cwd=work).splitlines()[-1])
    assert folder.startswith(str(work.parent)) and version == flora.__version__
    assert linear == merge == KINDS[kind][0]
    assert call(command, "--help", cwd=work).startswith("flora: federated LoRA fine-tuning")
    doctor = call(command, "doctor", cwd=work)
    said = [line for line in doctor.splitlines() if "merge_" in line and "cpu" in line]
    assert said and all(KINDS[kind][0] in line for line in said), doctor
    host = next(line for line in doctor.splitlines() if "host extension" in line)
    assert ("missing" in host) == (kind == "pure")


@pytest.mark.slow
def test_a_wheel_trains_outside_the_source_tree(installed):
    kind, _, command, work = installed
    save_model(work / "model")
    write_rows(work / "rows.jsonl", 40)
    settings = {"model_name_or_path": "model", "dataset": "rows.jsonl", "num_clients": 2, "num_rounds": 1, "lora_r": [8, 4],
                "max_steps": 2, "eval_rows_per_client": 2, "server_eval_rows": 4, "target_modules": list(TARGETS), "device": "cpu",
                "partition": {"iid": True}, "output_dir": "out"}
    (work / "config.yaml").write_text(yaml.safe_dump(settings))
    call(command, "run", "config.yaml", cwd=work, HF_HUB_OFFLINE="1")
    environment = json.loads((work / "out" / "environment.json").read_text())
    assert {row["backend"] for row in environment["kernels"]} == {KINDS[kind][0]}
    assert (work / "out" / "model" / "model.safetensors").exists()
    call(command, "verify", "out", cwd=work)

"""Five hundred rounds in which clients die or send garbage: memory, files and threads stay flat, and the model is as good."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

pytestmark = pytest.mark.soak
ROUNDS, SEEDS = 500, (0, 1, 2)


def run(folder, seed, faults):
    command = [sys.executable, str(Path(__file__).with_name("rounds.py")), str(folder), str(ROUNDS), str(seed), str(int(faults))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    *held, last = map(json.loads, done.stdout.splitlines())
    return held, last


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    return {(seed, faults): run(tmp_path_factory.mktemp("rounds") / "run", seed, faults)
            for seed in SEEDS for faults in (False, True)}


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_held_that_was_not_held_after_fifty_rounds(soaked, seed):
    held, last = soaked[seed, True]
    early, late = next(row for row in held if row["round"] == 50), held[-1]
    print(f"seed {seed}: {early} {late} {last}")
    assert late["round"] == ROUNDS and late["rss"] <= 1.05 * early["rss"]
    for name in ("files", "threads"):
        assert {row[name] for row in held if row["round"] >= 50} == {early[name]}
    assert {row["children"] for row in held} == {0}
    assert last["died"] > 0.07 * 10 * ROUNDS and last["refused"] > 0.03 * 10 * ROUNDS


def test_the_model_is_as_good_as_without_faults(soaked):
    """Within the spread of the runs without faults over the seeds, of their mean."""
    clean, faulty = ([soaked[seed, faults][1]["loss"] for seed in SEEDS] for faults in (False, True))
    print(f"final loss without faults {clean}, with {faulty}")
    mean = sum(clean) / len(clean)
    assert abs(sum(faulty) / len(faulty) - mean) <= max(clean) - min(clean)
    assert max(*clean, *faulty) < 2.7                           # of 16 tokens: log 16 is 2.77

"""The examples run as they stand, in seconds, and show what they say."""
import re

import pytest
from tiny import ROOT, python

pytest.importorskip("peft", reason="peft is not installed: the examples that use it were not run")


def output(name):
    done = python(str(ROOT / "examples" / name))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_plain_loop_learns_in_forty_lines():
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", output("plain_loop.py"))]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert len((ROOT / "examples" / "plain_loop.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_one_line_makes_the_average_exact():
    averaged, exact = (float(error) for error in re.findall(r"off by (\S+) of", output("openfedllm_style.py")))
    assert averaged > 0.1 and exact < 1e-6


def test_sft_trainer_trains_what_flora_computes_and_peft_reads_it():
    pytest.importorskip("trl", reason="trl is not installed: the example under its SFTTrainer was not run")
    said = output("sft_trainer.py")
    losses = [float(loss) for loss in re.search(r"^losses (.*)$", said, re.M)[1].split()]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert float(re.search(r"off by (\S+)$", said, re.M)[1]) < 1e-5

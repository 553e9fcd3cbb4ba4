"""`make gpu` without a GPU: its parts end in time, what they published stays, and the summary says which targets are reached."""
import json
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT

from benchmarks import gpu, measure, summary
from benchmarks.gpu import Part

SAYS = "import sys; print('seen', flush=True); "


def python(code):
    return [sys.executable, "-c", SAYS + code]


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_RESULTS", str(tmp_path / "out"))
    return tmp_path / "out"


def called(monkeypatch, *arguments, parts=None):
    """main() with these arguments and parts; its exit code."""
    if parts is not None:
        monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    return left.value.code


def test_a_part_ends_in_time_with_all_its_processes(tmp_path):
    child = "import subprocess, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, " \
        "flush=True); time.sleep(60)"
    log, began = tmp_path / "log", time.monotonic()
    assert gpu.run("slow", [python(child), python("print('never')")], 2.0, log, {}).startswith("stopped after")
    said = log.read_text().split()
    assert time.monotonic() - began < 20 and said[0] == "seen" and "never" not in said
    state = Path(f"/proc/{said[1]}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":           # ended; nobody may have asked for its exit code yet
            return
        time.sleep(0.1)
    pytest.fail("the command's own process goes on")


def test_what_fails_is_said_and_the_rest_goes_on(out, monkeypatch, capsys):
    parts = {"tests": Part("proves", (), [python("sys.exit(3)"), python("print('second')")]),
             "green": Part("measures", (), [python("import os; print('told', os.environ.get('FLORA_GREEN'))")]),
             "package": Part("needs a package", (), [python("")], ["no_such"]),
             "none": Part("has no small form", [python("")])}
    assert called(monkeypatch, "--small", parts=parts) == 1
    said = capsys.readouterr().out
    assert "failed: exit code 3, see tests.log" in said and "second" in said and "told 1" in said
    assert "left out: no_such not installed" in said
    kept = json.loads((out / "parts.json").read_text())
    assert list(kept["parts"]) == list(parts) and kept["parts"]["none"]["outcome"] == "left out: it has no small form"
    assert {"versions", "commit", "driver", "gpu"} <= set(kept["about"])
    assert called(monkeypatch, "green", "--small") == 0
    assert list(json.loads((out / "parts.json").read_text())["parts"]) == list(parts)
    assert "FLORA_GREEN" not in gpu.settings_of(False, {"tests": "failed: exit code 1"})
    assert gpu.settings_of(False, {"tests": "done"})["FLORA_GREEN"] == "1"


def test_a_tool_that_is_not_there_leaves_its_part_out(out, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"versions": {}, "commit": None, "gpu": "Card", "driver": "1", "cuda": "2"})
    assert called(monkeypatch, "tool", parts={"tool": Part("needs a tool", [["no-such-tool"]], tool="no-such-tool")}) == 0
    assert "left out: no-such-tool not installed" in capsys.readouterr().out and (out / "summary.md").exists()


def test_what_cannot_be_done_is_refused(out, monkeypatch, capsys):
    assert called(monkeypatch, "merg") == 2 and "expected parts of build, tests" in capsys.readouterr().err
    assert "expected an NVIDIA GPU" in called(monkeypatch, "merge") and not out.exists()


def test_every_module_of_a_part_exists_and_every_gpu_test_is_among_its_files():
    for part in gpu.PARTS.values():
        for command in (*part.commands, *part.small):
            module = command[command.index("-m") + 1] if "-m" in command else "pytest"
            assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    assert {"tests/test_merge_gpu.py", "tests/test_backends.py", "tests/test_triton.py"} <= set(gpu.gpu_tests())
    assert "tests/test_gpu_command.py" not in gpu.gpu_tests()


def row(case, variant, ms, **more):
    return {"case": case, "variant": variant, "ms": ms, "ms_low": ms, "ms_high": ms, "against": "peft", "times_against": 1.0,
            "times_limit": None, **more}


def test_cases_stay_until_they_are_measured_again_or_the_machine_changes(out, monkeypatch, capsys):
    now = {"versions": {"torch": "1"}, "commit": "a"}
    monkeypatch.setattr(measure, "environment", lambda: dict(now))
    measure.publish("x", [row("one", "flora", 1.0), {"case": "two", "variant": "flora", "error": 0.5}])
    now["commit"] = "b"
    measure.publish("x", [row("one", "flora", 2.0)])
    kept = json.loads((out / "x.json").read_text())
    assert kept["about"]["commit"] == "b" and [(r["case"], r["commit"]) for r in kept["rows"]] == [("two", "a"), ("one", "b")]
    now["versions"] = {"torch": "2"}
    measure.publish("x", [row("three", "flora", 2.0)])
    assert [r["case"] for r in json.loads((out / "x.json").read_text())["rows"]] == ["three"]
    assert "three" in capsys.readouterr().out


def test_targets_are_judged_by_what_the_benchmarks_write(out, monkeypatch):
    monkeypatch.setattr(measure, "environment", lambda: {"versions": {}, "commit": "a", "gpu": "Card", "driver": "1", "cuda": "2"})
    seven, merge = summary.layer("7B"), summary.MERGE
    measure.publish("lora_linear", [row(seven, "flora", 11.0), row(seven, "bare products", 10.0), row(seven, "peft", 12.0),
                                    row(seven, "addmm_ form", 13.2), row(seven, "idea: more K", 1.0)])
    measure.publish("merge", [row(merge, "flora", 2.0, times_limit=1.25, extra_mb=0.0), row(merge, "PEFT one by one", 50.0)])
    measure.publish("round", [row(f"a round of {summary.cohort(1)}, 3 steps", name, ms)
                              for name, ms in (("PEFT loop", 9.0), ("PEFT loop, all bf16", 5.0), ("flora", 1.0))])
    (out / "parts.json").write_text(json.dumps({"about": measure.environment(), "parts": {}}))
    lines = {line.split("|")[1].strip(): line for line in summary.markdown(out).splitlines() if line.count("|") == 5}
    judged = {what: line.split("|")[3].strip() + line.split("|")[4] for what, line in lines.items()}
    assert judged[f"7B: {summary.LINEARS}: times the bare products"] == "1.1 reached "
    assert judged["7B: the same: faster than peft"] == "1.09 **not reached** "
    assert judged["7B: the same: faster than addmm_ form"] == "1.2 reached "
    assert judged["every shape: the fastest peer's time over flora's"] == "1.09 reached "
    assert judged["7B: merge of ten clients: share of the copy bandwidth"] == "0.8 **not reached** "
    assert judged["7B: merge: faster than PEFT one by one"] == "25 reached "
    assert judged["TinyLlama, ten clients of 1 x 512: faster than PEFT's loop in bf16"] == "5 reached "
    assert judged[f"1B: {summary.LINEARS}: times the bare products"] == "– not measured "


def test_a_small_benchmark_runs_as_a_part(out, monkeypatch, capsys):
    assert called(monkeypatch, "lora_linear", "--small") == 0
    cases = {r["case"] for r in json.loads((out / "lora_linear.json").read_text())["rows"]}
    assert len(cases) == 6 and any("downlink" in case for case in cases)
    assert "### tiny, 64 rows, one adapter" in (out / "summary.md").read_text()

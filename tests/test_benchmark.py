"""`flora bench`: what it measures is right before it is timed; stored tables are shown as they are. No time is tested."""
import json

import pytest
import torch

import flora
from flora import benchmark, ops
from flora.cli import main
from flora.errors import BackendError, ConfigError
from flora.speed import interleaved, roofline, rows_of


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", ((24, 16), (16, 40)))
    monkeypatch.setattr(benchmark, "ROWS", 6)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda *_: 1e9)


def test_every_case_has_plain_pytorch_and_the_limit_beside_it(small, capsys):
    rows = flora.bench()
    cases = {row["case"]: [r["variant"] for r in rows if r["case"] == row["case"]] for row in rows}
    assert len(cases) == 6 and all(names[:2] == ["flora", "plain PyTorch"] and len(names) == 3 for names in cases.values())
    assert all(row["times_limit"] > 0 and row["against"] == "plain PyTorch" for row in rows)
    assert {row["case"].split(",")[0] for row in flora.bench("merge", quick=True)} == {"merge"}
    assert len({row["case"] for row in flora.bench(quick=True)}) == 3
    assert main(["bench", "lora_linear", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "lora_linear, 24 x 16" in said and "16 x 40" not in said and "x limit" in said and "1.00*" in said


@pytest.mark.parametrize(("name", "operator"), [("lora_linear", "lora_linear"), ("merge", "merge_many_")])
def test_a_wrong_result_is_not_timed(small, monkeypatch, name, operator):
    right = getattr(ops, operator)

    def wrong(*args):
        made = right(*args)
        target = args[0][0] if isinstance(args[0], list) else made
        with torch.no_grad():
            target.view(-1)[3] += 0.05 * target.abs().max()
        return made

    monkeypatch.setattr(ops, operator, wrong)
    monkeypatch.setattr(benchmark, "interleaved", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(BackendError, match="so no time is reported"):
        flora.bench(name)


def test_stored_tables_are_shown_and_a_wheel_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    assert main(["bench", "--show"]) == 1 and "installed without its source" in capsys.readouterr().err
    (tmp_path / "card").mkdir()
    row = {"case": "one", "variant": "flora", "ms": 1.25, "ms_low": 1.0, "ms_high": 1.5, "against": "flora", "times_against": 1.0,
           "times_limit": 2.0}
    (tmp_path / "card" / "cohort.json").write_text(json.dumps({"rows": [row, {"case": "error", "variant": "x", "error": 1}]}))
    (tmp_path / "card" / "depth.json").write_text(json.dumps({"rows": [{**row, "case": "two"}]}))
    assert main(["bench", "--show", "cohort"]) == 0
    said = capsys.readouterr().out
    assert "cohort on card" in said and "1.250" in said and "2.00" in said and "two" not in said
    assert [row["name"] for row in benchmark.stored()] == ["cohort", "depth"]
    with pytest.raises(ConfigError, match="expected one of cohort, depth; got 'cohor'; did you mean cohort?"):
        benchmark.stored("cohor")
    with pytest.raises(ConfigError, match="expected lora_linear or merge"):
        flora.bench("cohort")


def test_the_shipped_results_are_read():
    assert {"lora_linear", "merge", "cohort", "round"} <= {row["name"] for row in benchmark.stored()}


def test_medians_quartiles_and_ratios():
    a, b = rows_of("case", {"a": [1.0, 2.0, 3.0], "b": [4.0, 4.0, 4.0]}, "a", 0.5)
    assert (a["ms"], b["ms"], b["times_against"], b["times_limit"]) == (2000.0, 4000.0, 2.0, 8.0) and a["ms_low"] == 1500.0
    turns = []
    times = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=2, warmup=1)
    assert turns == ["a", "b"] * 3 and [len(seconds) for seconds in times.values()] == [2, 2]


def test_the_roofline_is_bound_by_operations_or_by_bytes():
    shapes = [("", 30, 20)]                                     # 10 rows, rank 2: 2 * 10 * (30 * 20 + 2 * 30) + 2 * 10 * 2 * 20
    assert roofline(shapes, 10, 2, 4, (1.0, 1e30), False) == 12_000 + 1_200 + 800
    assert roofline(shapes, 10, 2, 4, (1e30, 1.0), False) == 4 * (10 * 20 + 10 * 30 + 30 * 20) + 4 * 10 * 20
    assert roofline(shapes, 10, 2, 4, (1.0, 1e30), True) == 14_000 + 12_000 + 800 + 2 * 1_200 + 800

"""flora tune: what is measured, in which order, what is kept and read again; and code that is compiled before it is launched."""
import json
import os
import subprocess
import sys

import pytest
import torch
from test_triton import DEVICE, module, on_a_gpu, pytestmark, tables
from tiny import ROOT

from flora import tuning

if module is not None:
    from flora.kernels.triton import launch, rule, tune
__all__ = ["pytestmark", "tables"]
NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"


@pytest.fixture
def ticks(monkeypatch):
    """Seconds that each form, and each number of splits, are said to take."""
    said = {}

    def once(self, call, count, busy):
        call()
        return said.get("now", 1.0)

    monkeypatch.setattr(tune._Clock, "once", once)
    for op in ("lora_linear", "lora_linear_backward"):
        monkeypatch.setattr(tune.backend, op, lambda *a: said.update(now=said.get(rule._forced, 1.0)))
    for kernel in ("shrink", "outer", "dy_pass", "add_low_rank"):
        monkeypatch.setattr(tune, kernel, lambda *a, config, **k: said.update(now=said.get(config.splits, 1.0)))
    return said


def measured(shapes, **options):
    return [result for _, results in tune.tune(shapes, torch.float16, DEVICE, **options) for result in results]


@pytest.mark.parametrize("segmented", [False, True])
def test_the_fastest_is_taken_if_it_is_so_by_the_margin(tables, ticks, segmented):
    shape = tune.Shape(40, 600, 650, 20, segmented)
    ticks |= {form: 1.0 - 0.02 * k for k, form in enumerate(rule.FORMS)} | {2: 0.5}
    results = measured([shape])
    forms = [m for m in results if isinstance(m.taken, rule.Form)]
    expected = [form for form in rule.FORMS if form.skinny == "triton" or not segmented]
    assert [m.key.split()[0] for m in forms] == ["forward", "backward"] and all(list(m.seconds) == expected for m in forms)
    assert {m.taken for m in forms} == {rule.FORMS[3]}
    splits = {m.key.split()[0]: m.taken.splits for m in results if m not in forms}
    assert splits["shrink"] == splits["dy_pass"] == 2 and set(splits.values()) == {1, 2}
    found = rule.table(NAME)
    assert found.forms == {m.key: m.taken for m in forms} and found.blocks == {m.key: m.taken for m in results if m not in forms}
    ticks |= dict.fromkeys(rule.FORMS, 1.0) | {rule.FORMS[3]: 0.98, 2: 0.98}
    found.path.unlink()
    again = measured([shape])
    assert {m.taken for m in again if isinstance(m.taken, rule.Form)} == {expected[0]}
    assert all(m.taken == next(iter(m.seconds)) for m in again)


def test_what_was_measured_is_not_measured_again_unless_the_versions_differ(tables, ticks, monkeypatch):
    shapes = [tune.Shape(40, 33, 35, 4, False), tune.Shape(42, 31, 33, 4, False), tune.Shape(40, 33, 35, 4, True)]
    measured(shapes)
    assert len(rule.table(NAME).forms) == 4 and measured(shapes) == []                   # the second rounds to the first
    monkeypatch.setattr(tune, "versions", lambda: {"torch": "other"})
    assert len([m for m in measured(shapes[:1]) if isinstance(m.taken, rule.Form)]) == 2 == len(rule.table(NAME).forms)


def test_no_shape_is_begun_after_its_minutes_and_the_next_start_goes_on(tables, ticks, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(tune.time, "monotonic", lambda: 60.0 * next(now))
    shapes = [tune.Shape(40, 33, 35, rank, False) for rank in (2, 4, 8, 16)]
    assert [left for left, _ in tune.tune(shapes, torch.float16, DEVICE, minutes=3)] == [3, 2]
    assert [left for left, _ in tune.tune(shapes, torch.float16, DEVICE)] == [1, 0]


def test_a_call_asks_for_what_its_measurement_was_written_under(tables, monkeypatch):
    """Forms: ten clients as one, by the ranks of the largest. Blocks: every kernel of every form, by what measures it."""
    asked, forms = set(), []
    blocks, form = rule.blocks, rule._form
    monkeypatch.setattr(rule, "forget", lambda: None)
    monkeypatch.setattr(rule, "blocks", lambda *a: (asked.add(rule.blocks_key(*a[:6], *a[7:])), blocks(*a))[1])
    monkeypatch.setattr(rule, "_form", lambda *a: (forms.append(rule.shape_key(*a[:6], a[7])), form(*a))[1])
    for segmented in (False, True):
        for layers, rank in ((1, 20), (1, 40), (3, 6)):
            shape = tune.Shape(40, 33, 37, rank, segmented, layers)
            operands = tune._Operands(shape, torch.float16, DEVICE)
            for op, call in operands.passes().items():
                call()
                assert set(forms) == {shape.key(op, torch.float16)}
                forms.clear()
                for one in operands.forms():
                    tune._with(one, call)()
            assert asked == set(operands.candidates({}))
            asked.clear()


@on_a_gpu
def test_tuning_runs_every_kernel_and_operator_itself(tables, monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 1)
    for shape in (tune.Shape(12, 9, 10, 11, False), tune.Shape(12, 9, 10, 3, True, 2), tune.Shape(12, 9, 10, 33, False)):
        blocks = {}
        results = list(tune.measure(shape, torch.float16, DEVICE, blocks))
        assert len(results) == len(blocks) + 2 and all(value > 0 for m in results for value in m.seconds.values())
        rule.measuring(None)


def test_what_cannot_be_compiled_is_left_out_with_a_warning():
    def refuse():
        raise tune.TritonError("too much shared memory")
    with pytest.warns(UserWarning, match="not measured: second, TritonError: too much shared memory"):
        assert set(tune._Clock("cpu").compare({"first": lambda: None, "second": refuse})) == {"first"}


def test_the_likeliest_shapes_come_first():
    first = tuning.cases(None, None, None)
    assert first[:2] == [(8192, 4096, 4096, 16, False, 3), (8192, 11008, 4096, 16, False, 2)]
    assert [case[0] for case in first[:24]] == [8192] * 8 + [512] * 8 + [5120] * 8 and not any(case[4] for case in first[:24])
    assert all(case[4] for case in first[24:48]) and len(set(first)) == len(first)
    assert tuning.cases([(8, 9)], [3], [2]) == [(3, 8, 9, 2, False, 1), (3, 8, 9, 2, True, 1)]


def test_a_line_says_what_was_taken_and_against_what(tables, ticks):
    ticks |= {rule.FORMS[3]: 0.5}
    lines = [tuning.told(m) for m in measured([tune.Shape(40, 33, 35, 4, False)])]
    assert lines[-1] == "backward 32x32x32 r4 float16: skinny triton, base fused, 500000.0 us, 2.00 times the first of 4 tried"
    assert lines[0].startswith("shrink 32x0x32 r4 float16: ") and "splits" in lines[0]


def test_triton_itself_takes_our_launches_as_it_takes_its_own():
    """Compiled for sm_90 by the real compiler, in a process in which nothing is interpreted."""
    done = subprocess.run([sys.executable, "-m", "tests.launched"], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ahead"] == said["compiled"] == len(said["launches"]) == 7
    assert all(ours == theirs for ours, theirs in said["launches"])


class Kernel:
    """Stands for a compiled kernel: what it was compiled for, and what it was launched with."""
    compiled, launched, run = [], [], None

    def warmup(self, *args, grid, **options):
        self.compiled.append((args, options))
        return self

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that is launched as on a GPU, on card 0."""
    class Driver:
        active = type("Card", (), {"get_current_device": staticmethod(lambda: 0)})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "driver", Driver)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(Kernel, "compiled", [])
    monkeypatch.setattr(Kernel, "launched", [])
    return Kernel()


def test_code_is_compiled_for_each_kind_of_arguments_and_found_again(kernel):
    x = torch.zeros(64)
    one = ((3,), (x, None), (7, 0.5), (4, 1), (True, 16), 4, 3)
    for _ in range(2):
        launch.launch(kernel, *one)
    launch.launch(kernel, (9,), (torch.ones(64), None), (8, 0.1), *one[3:])                 # another grid, tensor and loose numbers
    assert len(kernel.compiled) == 1 and kernel.compiled[0][1] == {"num_warps": 4, "num_stages": 3}
    assert [grid for grid, _ in kernel.launched] == [(3, 1, 1), (3, 1, 1), (9, 1, 1)]
    assert kernel.launched[0][1] == (x, None, 7, 0.5, 4, 1, True, 16) and kernel.launched[2][1][2:4] == (8, 0.1)
    others = [(1, (x[1:], None)), (1, (x.half(), None)), (1, (x, x)), (3, (4, 2)), (4, (False, 16)), (5, 8), (6, 2)]
    for number, (place, value) in enumerate(others, 2):
        launch.launch(kernel, *one[:place], value, *one[place + 1:])
        assert len(kernel.compiled) == number, (place, value)


def test_ahead_compiles_what_would_be_launched_once_and_launches_nothing(kernel):
    x, rest = torch.zeros(64), ((7,), (4,), (16,))
    with launch.ahead(2) as count:
        for tensor in (x, x[4:], x[1:], x):
            launch.launch(kernel, (3,), (tensor,), *rest)
    assert count == [2] and len(kernel.compiled) == 2 and not kernel.launched
    seen = sorted((args[0].data_ptr() % 16, args[0].dtype, args[1:]) for args, _ in kernel.compiled)
    assert seen == [(0, torch.float32, (7, 4, 16)), (4, torch.float32, (7, 4, 16))]
    launch.launch(kernel, (3,), (x,), *rest)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 1


def test_what_cannot_be_compiled_ahead_is_said(kernel, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no such instruction")
    monkeypatch.setattr(kernel, "warmup", refuse, raising=False)
    with pytest.raises(RuntimeError, match="no such instruction"), launch.ahead():
        launch.launch(kernel, (3,), (torch.zeros(4),), (), (), ())
    assert launch._queue is None

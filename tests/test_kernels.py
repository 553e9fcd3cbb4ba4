"""Which backend runs what: a fixed order, force that never falls back in silence, and a missing backend that is reported."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora import kernels, ops
from flora.errors import BackendError, FloraError
from flora.kernels import reference

ROOT = Path(__file__).resolve().parents[1]
HAS_NATIVE = kernels._load("native")[0] is not None
native = pytest.mark.skipif(not HAS_NATIVE, reason=f"native is not built ({kernels._load('native')[1]}): its choice was not tested")


@pytest.fixture
def backends(monkeypatch):
    """backends(native={"merge_": ("cpu",)}): kernels that has just these besides the reference."""
    def install(**tables):
        def load(name):
            if name == "reference":
                return reference, ""
            if name not in tables:
                return None, f"{name} was left at home"
            functions = {op: (lambda *args, op=op: op) for op in tables[name]}
            return type(name, (), {"OPERATORS": tables[name], **functions}), ""
        monkeypatch.setattr(kernels, "_load", load)
    return install


@pytest.mark.skipif(os.environ.get("FLORA_REQUIRE_NATIVE") != "1",
                    reason="FLORA_REQUIRE_NATIVE is not 1: that every operator runs compiled code was not tested")
def test_the_native_backend_that_was_built_is_the_one_that_runs():
    chosen = {c.operator: c.backend for c in kernels.table() if c.device == "cpu"}
    assert set(chosen.values()) == {"native"}


@native
def test_the_first_backend_that_has_the_operator_is_taken():
    for op in kernels.OPERATORS:
        assert kernels.resolve(op, torch.device("cpu")).__module__ == "flora.kernels.native"


def test_the_order_is_triton_native_reference(backends):
    backends(triton={"lora_linear": ("cuda",), "merge_": ("cpu", "cuda")}, native={"merge_": ("cpu",), "stack_": ("*",)})
    table = {c.operator: c for c in kernels.table() if c.device == "cpu"}
    assert {op: c.backend for op, c in table.items()} == {
        "lora_linear": "reference", "lora_linear_backward": "reference", "lora_add_": "reference", "merge_": "triton",
        "stack_": "native", "checked_merge_": "reference"}
    assert table["merge_"].why == "first choice" and "triton: it has no stack_" in table["stack_"].why
    assert "triton: it has no lora_linear for cpu, only for cuda" in table["lora_linear"].why
    assert "native: it has no lora_linear" in table["lora_linear"].why
    assert kernels.resolve("lora_linear", "cuda")() == "lora_linear"


def test_the_table_has_a_line_for_every_operator_with_its_reason():
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    assert [(c.device, c.operator) for c in kernels.table()] == [(d, op) for d in devices for op in kernels.OPERATORS]
    assert all(c.backend in kernels.BACKENDS and c.why for c in kernels.table())
    for name in kernels.BACKENDS:
        module, why = kernels._load(name)
        assert (module is None) == bool(why)


def test_force_is_nested_and_undone_whatever_happens():
    with pytest.raises(KeyError), kernels.use("reference"):
        assert kernels.resolve("merge_", "cpu") is reference.merge_
        assert {c.why for c in kernels.table()} == {"forced by kernels.use"}
        with pytest.raises(ZeroDivisionError), kernels.use("reference"):
            raise ZeroDivisionError
        assert kernels._forced == "reference"
        raise KeyError
    assert kernels._forced is None


@native
def test_a_forced_backend_is_nested_in_another_and_never_falls_back():
    with kernels.use("reference"):
        with kernels.use("native"):
            assert kernels.resolve("stack_", "cpu").__module__ == "flora.kernels.native"
            assert {c.operator for c in kernels.table() if c.device == "cpu"} == set(kernels.OPERATORS)
            with pytest.raises(BackendError, match="lora_linear on meta was forced to run on 'native', which cannot"):
                kernels.resolve("lora_linear", "meta")
        assert kernels.resolve("stack_", "cpu") is reference.stack_


def test_what_cannot_be_forced_is_refused_at_once(backends):
    with pytest.raises(BackendError, match="triton, native, reference; got 'cuda'"), kernels.use("cuda"):
        raise AssertionError("entered")
    backends()
    with pytest.raises(BackendError, match="'native' was asked .* here: native was left at home"), kernels.use("native"):
        raise AssertionError("entered")
    assert kernels._forced is None and issubclass(BackendError, (FloraError, RuntimeError))


def test_an_operator_that_no_backend_has_is_refused():
    with pytest.raises(BackendError, match="no backend has 'nonsense' for cpu"):
        kernels.resolve("nonsense", "cpu")


def test_a_backend_that_does_not_import_is_listed_with_its_reason():
    """In a process of its own, where loading the compiled library fails: results are right, the table says what is lost."""
    code = """
import torch
def refuse(path): raise OSError("undefined symbol: _ZN4flora")
torch.ops.load_library = refuse
from flora import kernels, ops
weight = torch.zeros(2, 2)
ops.merge_(weight, torch.ones(1, 2), torch.ones(2, 1), torch.ones(1))
print(weight.sum().item(), *[f"{c.operator}|{c.backend}|{c.why}" for c in kernels.table()], sep="\\n")
try:
    with kernels.use("native"): pass
except kernels.BackendError as error: print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[0] == "4.0", done.stderr
    reason = "undefined symbol: _ZN4flora" if HAS_NATIVE else "not built"
    for op in ("merge_", "stack_"):
        assert any(line.startswith(f"{op}|reference|") and reason in line for line in lines), lines
    assert lines[-1].startswith("refused:") and reason in lines[-1]


@pytest.mark.parametrize(("files", "reason"), [
    ((), "not built: no _native"), (("_native.a.so", "_native.b.so"), "remove the stale"),
    (("_native.so",), "does not load under torch")])
def test_a_library_that_is_missing_doubled_or_broken_is_said(tmp_path, monkeypatch, files, reason):
    """A copy of the module beside no library, two, or one that is nonsense."""
    folder = tmp_path / "pretend" / "kernels"
    folder.mkdir(parents=True)
    (folder / "native.py").write_text((ROOT / "flora" / "kernels" / "native.py").read_text())
    for name in files:
        (folder.parent / name).write_text("nonsense")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("pretend", "pretend.kernels", "pretend.kernels.native"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=reason):
        importlib.import_module("pretend.kernels.native")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4), st.integers(1, 40), st.floats(0.0, 0.99))
def test_the_dropout_mask_is_the_one_that_is_specified(keys, columns, dropout):
    mask = reference.dropout_mask(torch.tensor(keys), columns, dropout, torch.float64)
    kept = oracles.murmur_mask(keys, columns, dropout)
    assert torch.equal(mask != 0, kept) and torch.equal(mask[kept], torch.full_like(mask[kept], 1 / (1 - dropout)))


def test_a_mask_has_its_rate_and_rows_that_are_not_alike():
    keys = ops.row_keys(7, torch.arange(400))
    for dropout in (0.05, 0.5, 0.9):
        mask = reference.dropout_mask(keys, 500, dropout, torch.float64)
        deviation = (dropout * (1 - dropout) / mask.numel()) ** 0.5
        assert abs(float((mask == 0).double().mean()) - dropout) < 5 * deviation
        for axis in (0, 1):                                            # no row and no column stands out
            spread = (mask == 0).double().mean(axis).std() / (dropout * (1 - dropout) / mask.shape[axis]) ** 0.5
            assert 0.8 < float(spread) < 1.2
    alike = (mask[:-1] == mask[1:]).double().mean() - (0.9**2 + 0.1**2)
    assert abs(float(alike)) < 0.01 and len(set(keys.tolist())) == 400


def test_row_keys_tell_every_part_and_its_place():
    parts = [ops.row_keys(*p).item() for p in ((1,), (1, 2), (2, 1), (0, 1), (1, 0), (), (2**64 + 3,), (-1,), (2**63,))]
    assert len(set(parts)) == len(parts)
    assert torch.equal(ops.row_keys(2**64 + 3), ops.row_keys(3)) and torch.equal(ops.row_keys(torch.tensor(3)), ops.row_keys(3))
    grid = ops.row_keys(5, torch.arange(3)[:, None], torch.arange(4))
    assert grid.shape == (3, 4) and grid[2, 1] == ops.row_keys(5, 2, 1) and len(set(grid.flatten().tolist())) == 12
    assert ops.row_keys(0).item() == -2152535657050944081                  # SplitMix64's first number from 0: 0xE220A8397B1DCDAF

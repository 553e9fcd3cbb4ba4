"""The header says what ran every operator; every test starts from one seed; a test that needs a GPU says what it left out."""
import contextlib
import inspect
import os

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")     # a compiler that never runs tests nothing

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                   # before a kernel is defined: they run on CPU tensors

import oracles
from tiny import save_model, write_rows

from flora import kernels, ops


def pytest_report_header(config):
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.cuda.is_available()}"]
    return lines + [f"flora: {c.operator} on {c.device}: {c.backend} ({c.why})" for c in kernels.table()]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("soak") and "soak" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes a quarter of an hour: make soak"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            said = (item.function.__doc__ or item.name).strip().splitlines()[0]
            item.add_marker(pytest.mark.skip(reason=f"no GPU here, so not tested: {said}"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or among others, and leaves no backend forced."""
    torch.manual_seed(0)
    yield
    assert kernels._forced is None, "a test left a backend forced"


@pytest.fixture(scope="session")
def compiled(request):
    """What the tests of a GPU would launch, compiled on all cores: each that asks for this is first run with nothing launched."""
    from flora.kernels.triton.launch import ahead
    ours = [item for item in request.session.items if item.get_closest_marker("gpu") and "compiled" in item.fixturenames
            and set(inspect.signature(item.function).parameters) <= set(getattr(getattr(item, "callspec", None), "params", ()))]
    oracles.dry = True
    try:
        with contextlib.suppress(Exception), ahead():                                # what fails will fail in its own test too
            for item in ours:
                torch.manual_seed(0)
                with contextlib.suppress(Exception, pytest.skip.Exception):          # no result is right here
                    item.function(**(item.callspec.params if hasattr(item, "callspec") else {}))
    finally:
        oracles.dry = False


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and rows that runs read, for all tests of a module."""
    folder = tmp_path_factory.mktemp("runs")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The names of flora's operators in the order in which they were called."""
    seen = []
    for name in ("lora_linear", "lora_add_"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _run=run, _name=name, **k: (seen.append(_name), _run(*a, **k))[1])
    return seen

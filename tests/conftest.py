"""The header says what ran every operator; every test starts from one seed; a test that needs a GPU says what it left out."""
import os

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")     # a compiler that never runs tests nothing

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                   # before a kernel is defined: they run on CPU tensors

from flora import kernels


def pytest_report_header(config):
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.cuda.is_available()}"]
    return lines + [f"flora: {c.operator} on {c.device}: {c.backend} ({c.why})" for c in kernels.table()]


def pytest_collection_modifyitems(items):
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

"""Nodes of one test know nothing of those of another."""
import pytest


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Nodes whose processes begin and whose disks are empty."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    try:
        from flower_runs import restart
    except ImportError:                                         # no flwr, and the tests skip themselves
        yield
        return
    restart()
    yield
    restart()

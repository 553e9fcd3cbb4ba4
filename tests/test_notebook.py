"""The notebook runs as it stands, without a network, shows what it says, and is kept without outputs."""
import re

import pytest
from tiny import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: the notebook was not read")
PATH = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def book():
    return nbformat.read(PATH, 4)


def test_it_is_kept_without_outputs(book):
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) > 8 and not any(cell.outputs or cell.execution_count for cell in code)
    assert set(book.metadata) == {"kernelspec", "language_info"} and not any(cell.metadata for cell in book.cells)
    assert PATH.stat().st_size < 20_000


def test_it_runs_and_shows_what_it_says(book, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: the notebook was not run")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: the notebook was not run")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the notebook was not run")
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    client = nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    error = {name: float(value) for name, value in re.findall(r"^(flora|zeropad)\s+relative error (\S+)$", said, re.M)}
    assert error["flora"] < 1e-6 and error["zeropad"] > 0.1
    assert float(re.search(r"^rank 10 +relative error (\S+)$", said, re.M)[1]) < 1e-12
    assert float(re.search(r"largest difference of logits (\S+);", said)[1]) < 1e-4
    rows = re.findall(r"^(flora|zeropad)((?: +\d+\.\d\d){7})$", said, re.M)
    curves = {name: [float(loss) for loss in losses.split()] for name, losses in rows}
    assert len(curves) == 2 and all(losses[-1] < 0.5 * losses[0] for losses in curves.values())
    assert [o.output_type for o in outputs if "data" in o and "image/png" in o.data] == ["display_data"]

"""The tables of README.md and docs/ are those of benchmarks/results."""
import json

import pytest
from tiny import ROOT

from benchmarks import summary, tables


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: path.name)
def test_pages_have_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert text == tables.page(text), f"{path.name}: python -m benchmarks.tables writes its tables"


def test_every_table_is_on_some_page():
    text = "".join(path.read_text(encoding="utf-8") for path in tables.pages())
    assert {name for _, name, _ in tables.BLOCK.findall(text)} == set(tables.TABLES)


def test_the_newest_folder_of_a_card_is_taken(tmp_path):
    assert tables.gpu(tmp_path) == "**No GPU has timed anything of flora yet.**"
    for day, ms in (("2026-01-02", 13.0), ("2026-01-01", 11.0)):
        out = tmp_path / "NVIDIA-H100" / day
        out.mkdir(parents=True)
        (out / "parts.json").write_text(json.dumps({"about": {"commit": day}, "parts": {}}))
        rows = [{"case": summary.layer("7B"), "variant": name, "ms": it} for name, it in (("flora", ms), ("bare products", 10.0))]
        (out / "lora_linear.json").write_text(json.dumps({"rows": rows}))
    said = tables.page("a\n<!-- table: gpu -->\nold\n<!-- end -->\nb", tmp_path)
    assert "NVIDIA H100, 2026-01-02, commit 2026-01-02:" in said and "| 1.3 | **not reached** |" in said and "old" not in said
    assert said.startswith("a\n<!-- table: gpu -->\n") and said.endswith("<!-- end -->\nb")
    with pytest.raises(KeyError):
        tables.page("<!-- table: nothing -->\n<!-- end -->")


def test_the_table_is_that_of_the_file():
    row = next(r for r in json.loads((ROOT / "benchmarks/results/cpu-2-threads/cohort.json").read_text())["rows"]
               if r["clients"] == 10 and r["variant"] == "flora, one batch")
    line = next(line for line in tables.rates(tables.RESULTS).splitlines() if line.startswith("| 10 clients of 1 sequence"))
    assert line.endswith(f"| {row['tokens_per_second']:.0f} |")

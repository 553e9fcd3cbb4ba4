"""The README's Python runs as it stands; what it says of files and verbs is there."""
import re
from pathlib import Path

import pytest

from flora.cli import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_examples_of_the_layer_and_of_aggregate() -> None:
    assert len(BLOCKS) == 2
    assert "flora.attach" in BLOCKS[0]
    assert "flora.aggregate" in BLOCKS[1]


@pytest.mark.parametrize("block", BLOCKS, ids=["layer", "aggregate"])
def test_examples_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_the_file_tree_exists() -> None:
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.S)[1]
    paths = re.findall(r"(?:^|\s)((?:flora|csrc|examples|benchmarks|tests|docs|dev)/[\w./]*)", tree)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_verb_named_exists() -> None:
    assert set(re.findall(r"^flora (\w+)", README, re.M)) <= set(VERBS)


def test_no_placeholder_is_left() -> None:
    assert "DEMO_TABLE" not in README

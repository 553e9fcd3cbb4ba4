"""A user's code type-checks under `mypy --strict`, every lazy name with its own type, and what is wrong is found."""
import ast
import re
import subprocess
import sys
from importlib.resources import files

import pytest
from tiny import ROOT

import flora

WRONG = '''
def mistakes(a: Adapter) -> None:
    flora.aggregate([a])
    flora.aggregat([])
    flora.run(3)
    Adapter(a.A, a.B, "1")
    reveal_type(flora.stack)
    reveal_type(flora.ops.lora_linear)
'''


@pytest.mark.slow
def test_a_users_code_is_typed_and_its_mistakes_are_found(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed: the types of the public names were not checked")
    source = (ROOT / "tests" / "typed_user.py").read_text(encoding="utf-8")
    (tmp_path / "user.py").write_text(source + WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir",
               str(ROOT / ".mypy_cache"), str(tmp_path / "user.py")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    first = len(source.splitlines()) + 1
    found = {int(line) - first: text for line, text in re.findall(r"user\.py:(\d+): \w+: (.*)", said)}
    assert sorted(found) == [2, 3, 4, 5, 6, 7], said
    assert 'has no attribute "aggregat"' in found[3] and 'expected "Tensor | float"' in found[5]
    assert "Sequence[flora.adapter.Adapter]" in found[6] and "Any" not in found[6]
    assert "Segments" in found[7] and found[7].count("Tensor") > 5


def test_what_type_checkers_see_of_flora_is_what_it_has():
    """The imports under TYPE_CHECKING against the table that is used at run time; py.typed says that they may be read."""
    tree = ast.parse((ROOT / "flora" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(node.module, alias.name, alias.asname) for node in block.body for alias in node.names}
    modules = {("flora", name, name) for name in flora._MODULES}
    assert {entry for entry in seen if entry[0] == "flora"} == modules
    names = {(f"flora.{place}", name, name) for name, place in flora._WHERE.items()}
    assert {entry for entry in seen if entry[0] != "flora"} == names
    assert (files("flora") / "py.typed").is_file()

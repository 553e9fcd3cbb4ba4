"""A file imports only from files above it in the design's list, the core stays light, and no file outgrows its limit."""
import ast
import sys
from pathlib import Path

import pytest
from tiny import ROOT, tracked

LAYERS = [
    ["seeds", "files", "errors", "allocator", "parallel", "limits", "consistency"], ["sections"],
    ["config", "keystream", "accountant"], ["checks"], ["segments", "memory"],
    ["kernels.reference"], ["kernels.native", "kernels.triton"], ["kernels"], ["environment"], ["library"], ["merges"], ["ops"],
    ["adapter"], ["frames", "sharded"],
    ["layer"], ["shared"], ["targets"],
    ["nn"], ["adaptive"], ["forms"], ["packed", "whole"], ["wire", "exchange"], ["reading"], ["messages"],
    ["downlink"], ["versions"], ["formats"], ["ring", "masking", "sketch"], ["unmasking"], ["secure"],
    ["strategies"], ["proven"], ["privacy"], ["data"], ["attention"], ["packing"], ["losses"], ["evaluate"], ["scoring"],
    ["mmlu", "mt_bench"],
    ["grouping"], ["fleet"], ["capacity", "chooser"],
    ["client", "clock", "budget"], ["steps"], ["member"], ["per_example"], ["loop"], ["cohort"], ["group"], ["distributed"],
    ["stream"], ["inbox"], ["server"], ["snapshot"], ["checkpoint"],
    ["display", "tracking", "profiling"], ["report"], ["spread"], ["timing"], ["tables", "plots"],
    ["engines.scores"], ["engines.guards"], ["engines.prepare"], ["engines.processes"], ["engines.hierarchy"], ["engines.traffic"],
    ["engines.measure", "engines.plan", "engines.merge_log"], ["engines.telling"], ["engines.party", "engines.remote"],
    ["engines.local", "engines.flower", "engines.nvflare"], ["engines"],
    ["integrations"], ["options", "speed"], ["card"],
    ["doctor", "tuning", "shards", "comparison", "verification", "skew", "exporting", "starter", "benchmark"],
    ["page"], ["outcome"], ["evaluation", "conversation"], ["verbs"], ["cli"]]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGES = ("strategies", "data", "integrations", "kernels.triton", "page", "verbs")     # their own files may import each other
LIGHT = {"torch", "numpy", "safetensors", "flora"}
HEAVY_ALLOWED = {"config": {"pydantic", "yaml"}, "sections": {"pydantic"}, "report": {"rich"}, "display": {"rich"},
                 "doctor": {"rich"}, "engines.local": {"rich", "yaml"}, "engines.plan": {"rich"},
                 "engines.remote": {"yaml"}, "engines.flower": {"flwr", "yaml"}, "engines.nvflare": {"nvflare", "yaml"},
                 "kernels.triton": {"triton"}, "shards": {"rich"},
                 "tables": {"rich"}, "comparison": {"rich", "yaml"}, "verification": {"rich"}, "skew": {"rich"}, "speed": {"rich"},
                 "benchmark": {"rich"}, "evaluation": {"rich"}, "conversation": {"rich"},
                 "page": {"jinja2", "markupsafe", "plotly"},
                 "integrations": {"peft"}}


def unit(name):
    """The layer's name of a module of ours: "data.fetch" stands for "data"."""
    parts = name.split(".")
    return next((candidate for n in range(len(parts), 0, -1) if (candidate := ".".join(parts[:n])) in LEVEL), None)


def name_of(path):
    parts = path.relative_to(ROOT / "flora").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(module, at import time?) of every import in a file; those for type checkers alone are left out."""
    found = []

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                ours = child.module.split(".")[0] == "flora"
                found.extend((f"{child.module}.{alias.name}" if ours else child.module, top) for alias in child.names)
            else:
                walk(child, top and not isinstance(child, (ast.FunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


FILES = [path for path in sorted((ROOT / "flora").rglob("*.py")) if path != ROOT / "flora" / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_files_above_it(path):
    me = unit(name_of(path))
    assert me is not None, f"{path}: not in the design's list; give it a place there and here"
    for module, _ in imports(path):
        if not module.startswith("flora.") or module == "flora.__version__" or module.startswith("flora._"):
            continue
        other = unit(module.removeprefix("flora."))
        assert other is not None, f"{path} imports {module}, which has no place in the list"
        inside = me == other and (me in PACKAGES or me.startswith("engines"))
        top = LEVEL[me] == 0 and other == "errors"
        assert inside or top or LEVEL[other] < LEVEL[me], f"{path} imports {module}, which is not above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_core_imports_only_torch_numpy_and_safetensors(path):
    allowed = LIGHT | HEAVY_ALLOWED.get(unit(name_of(path)), set()) | set(sys.stdlib_module_names)
    outside = {module.split(".")[0] for module, at_import in imports(path) if at_import} - allowed
    assert not outside, f"{path} imports {outside} at import time; import it in the function that uses it"


def test_the_layer_rule_can_fail(tmp_path):
    """The reader sees an import in a function, under an if, and `from flora import x`, and leaves type checking out."""
    source = ("from typing import TYPE_CHECKING\nfrom flora import cohort\nif TYPE_CHECKING:\n    import rich\n"
              "def f():\n    import flora.cli\n    from flora.data.fetch import fetch\nif True:\n    import yaml\n")
    (tmp_path / "x.py").write_text(source)
    assert imports(tmp_path / "x.py") == [
        ("typing", True), ("flora.cohort", True), ("flora.cli", False), ("flora.data.fetch.fetch", False), ("yaml", True)]
    assert unit("data.fetch.fetch") == "data" and unit("engines.prepare.Job") == "engines.prepare" and unit("nowhere") is None


@pytest.mark.parametrize(("limit", "patterns"), [
    (300, ("flora/*.py", "tests/*.py", "benchmarks/*.py", "setup.py")),
    (400, ("csrc/*.cpp", "csrc/*.h", "csrc/*.cu", "csrc/*.cuh"))],
    ids=["python", "csrc"])
def test_no_file_outgrows_its_limit(limit, patterns):
    files = tracked(*patterns)
    assert len(files) > 5
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > limit} == {}


def test_every_docstring_of_a_module_is_short():
    """At most 25 lines: an idea, not a manual."""
    long = {name_of(path): len(doc.splitlines()) for path in FILES if (doc := ast.get_docstring(ast.parse(path.read_text())))
            and len(doc.splitlines()) > 25}
    assert long == {} and all(ast.get_docstring(ast.parse(Path(path).read_text())) for path in FILES)


def test_no_public_function_takes_keywords_that_it_does_not_name():
    """`**kwargs` hides a misspelt option. Adapter.to passes on what torch's own takes, aggregate checks every one, the layer in the
    place of PEFT's hands on what it does not know."""
    found = [f"{path.name}: {node.name}" for path in FILES for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.args.kwarg]
    assert found == ["adapter.py: to", "accelerated.py: forward", "__init__.py: aggregate"]

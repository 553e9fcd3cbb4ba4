"""No file of ours unpickles, evaluates text, or hands a line to a shell: what comes over the wire or from a file is data."""
import ast

import pytest
from test_layering import tracked
from tiny import ROOT

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "pickletools"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
         "yaml.full_load", "torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle", "pd.read_pickle",
         "subprocess.getoutput", "subprocess.getstatusoutput", "os.execv", "os.execvp", "runpy.run_path", "code.interact"}
FORBIDDEN = {"shell": (True,), "allow_pickle": (True,), "weights_only": (False,), "trust_remote_code": (True,)}


def dangers(source):
    """What is dangerous in a file: (line, what)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = {n.split(".")[0] for n in (names if isinstance(node, ast.Import) else [node.module or "", *names])}
            found += [(node.lineno, name) for name in sorted(modules & MODULES)]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in of_call(node)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            found.append((node.lineno, node.value.id))
    return found


def of_call(node):
    """What is dangerous in a call."""
    name = ast.unparse(node.func)
    keywords = {k.arg: k.value for k in node.keywords}
    if name in CALLS or name.rsplit(".", 1)[-1] == "read_pickle":
        yield name
    if name == "torch.load" and "weights_only" not in keywords:
        yield "torch.load without weights_only"
    for word, values in FORBIDDEN.items():
        value = keywords.get(word)
        if value is not None and not (isinstance(value, ast.Constant) and value.value not in values):
            yield f"{word}={ast.unparse(value)}"


FILES = [path for path in tracked("flora/*.py", "benchmarks/*.py", "examples/*.py", "dev/*.py", "setup.py") if path.suffix == ".py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_can_be_made_to_run_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


def test_every_folder_is_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"flora", "benchmarks", "examples", "setup.py"}
    assert len(FILES) > 80


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import dill as d", "x = eval('1')", "exec(text)", "torch.load(f)",
    "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)", "np.load(f, allow_pickle=True)", "yaml.load(f)",
    "subprocess.run(line, shell=True)", "subprocess.run(line, shell=flag)", "os.system(line)", "import marshal",
    "pandas.read_pickle(f)", "AutoModel.from_pretrained(n, trust_remote_code=True)", "__import__(name)", "compile(t, 'x', 'exec')"])
def test_each_danger_is_seen(line):
    assert dangers(f"def f():\n    {line}\n") != []


@pytest.mark.parametrize("line", ["model.eval()", "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "re.compile(p)",
                                  "np.load(f, allow_pickle=False)", "subprocess.run([a], shell=False)", "torch.compile(f)"])
def test_what_is_harmless_is_left_alone(line):
    assert dangers(line) == []

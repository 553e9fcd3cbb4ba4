"""The API pages list the public surface; everything on them has a docstring that names its parameters.

A parameter counts as named where its name, or that of one of a list of them, stands in the docstring of the function, its class or
its module, or of a function which that refers to ("as lora_linear"); or where its type says what it is: a switch, a path, a model,
a tokenizer, a class of flora.
"""
import ast
import re
from functools import cache

import pytest
from pages import PAGES, source
from tiny import ROOT

import flora

LISTED = re.compile(r"^::: ([\w.]+)(?:\n    options: \{members: (\[[^\]]*\]|false)[^\n]*\})?", re.M)
SAYS_ITSELF = {"bool", "str | Path", "Path", "nn.Module", "'PreTrainedTokenizerBase'"}
ENTRIES = [(match[1], match[2]) for page in PAGES for match in LISTED.finditer(page.read_text(encoding="utf-8"))
           if match[1].islower()]                               # a class of settings documents its keys one by one


@cache
def classes_of_ours() -> set[str]:
    return {node.name for path in (ROOT / "flora").rglob("*.py") for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef)}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module).read_text(encoding="utf-8"))


def public(module: str, members: str | None) -> dict[str, tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """What an entry shows, by name, with the module where it is defined. Raises KeyError for a member that is not there."""
    own = {node.name: (module, node) for node in tree(module).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if members == "false":
        return {}
    if not members:
        return {name: found for name, found in own.items() if not name.startswith("_")}
    passed_on = {alias.name: node.module for node in tree(module).body if isinstance(node, ast.ImportFrom) for alias in node.names}
    chosen = [one.strip() for one in members.strip("[]").split(",")]
    return {name: own.get(name) or public(passed_on[name], f"[{name}]")[name] for name in chosen}


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """The public ones and the constructor. Properties need no words, nor what another class of the module describes."""
    return [m for m in node.body if isinstance(m, ast.FunctionDef) and (not m.name.startswith("_") or m.name == "__init__")]


def text_of(node: ast.AST, module: str) -> str:
    """A docstring, and those of the module's functions that it refers to."""
    own = (ast.get_docstring(node) or "") + (ast.get_docstring(tree(module)) or "")
    others = {n.name: ast.get_docstring(n) or "" for n in tree(module).body if isinstance(n, ast.FunctionDef) and n is not node}
    return own + "".join(f"\n{others[word]}" for word in set(re.findall(r"\w+", own)) if word in others)


def unnamed(function: ast.FunctionDef, text: str) -> list[str]:
    """The parameters that neither the text nor their type explains."""
    arguments = function.args
    given = [a for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in ("self", "cls")]
    words = set(re.findall(r"\w+", text))
    out = []
    for a in given:
        kind = ast.unparse(a.annotation).removesuffix(" | None") if a.annotation else ""
        ours = kind.strip("'").split(".")[-1] in classes_of_ours()
        if not ({a.arg, a.arg.removesuffix("s")} & words or kind in SAYS_ITSELF or ours):
            out.append(f"{a.arg}: {kind}")
    return out


def problems(module: str, name: str, node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    text = text_of(node, module)
    found = [] if ast.get_docstring(node) else [f"{name}: no docstring"]
    if isinstance(node, ast.FunctionDef):
        return found + [f"{name}({a})" for a in unnamed(node, text)]
    described = {m.name for other in tree(module).body if isinstance(other, ast.ClassDef) for m in methods(other)
                 if ast.get_docstring(m)}
    for method in methods(node):
        is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in method.decorator_list)
        if not (method.name in described or is_property or method.name == "__init__"):
            found.append(f"{name}.{method.name}: no docstring")
        found += [f"{name}.{method.name}({a})" for a in unnamed(method, text + text_of(method, module))]
    return found


@pytest.mark.parametrize(("module", "members"), ENTRIES, ids=[module for module, _ in ENTRIES])
def test_public_names_have_docstrings_that_name_their_parameters(module, members):
    assert [problem for name, (where, node) in public(module, members).items() for problem in problems(where, name, node)] == []
    assert ast.get_docstring(tree(module)), f"{module}: what is it for?"


def test_all_that_flora_exports_is_on_the_pages():
    shown = {f"{module}.{name}" for module, members in ENTRIES for name in public(module, members)}
    missing = [f"flora.{where}.{name}" for name, where in flora._WHERE.items() if f"flora.{where}.{name}" not in shown]
    assert sorted(missing) == ["flora.adapter.Adapters", "flora.messages.Broadcast", "flora.messages.Update",
                               "flora.strategies.STRATEGIES"]           # data, and what is passed on from flora.exchange
    assert {"flora.exchange.Broadcast", "flora.exchange.Update"} <= shown


@pytest.mark.parametrize("module", ["ops", "nn", "messages", "formats", "strategies", "kernels", "integrations.peft", "privacy",
                                    "secure", "engines.local", "engines.flower", "engines.nvflare", "data", "evaluate", "errors"])
def test_modules_that_users_call_are_on_the_pages(module):
    assert any(listed == f"flora.{module}" or listed.startswith(f"flora.{module}.") for listed, _ in ENTRIES)


def test_the_rule_finds_what_it_looks_for():
    code = "def f(size: int, path: Path, rows: list, **rest):\n    'Cuts every row.'\ndef g(x): pass\n"
    f, g = ast.parse(code).body
    assert unnamed(f, ast.get_docstring(f)) == ["size: int"] and unnamed(g, "") == ["x: "]

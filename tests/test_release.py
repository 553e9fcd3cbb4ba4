"""One version everywhere, a citation that tools can read, a licence in full, and hooks that run."""
import hashlib
import re
import shlex
import subprocess
import sys

import yaml
from tiny import ROOT

import flora


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_date_agree():
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.M)
    cited = yaml.safe_load(read("CITATION.cff"))
    assert versions[0] == (flora.__version__, str(cited["date-released"])) and cited["version"] == flora.__version__
    assert versions == sorted(versions, key=lambda entry: [int(part) for part in entry[0].split(".")], reverse=True)
    headings = set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.M))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_the_format_needs():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    assert cited["authors"] == [{"name": "The flora authors"}] and cited["license"] == "Apache-2.0"
    paper, = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["url"].endswith("2409.05976")
    assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"]) and len(paper["authors"]) == 7


def test_the_licence_is_the_full_text():
    """Apache's own file, byte for byte."""
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30")


def test_hooks_are_local_and_their_commands_are_there():
    """Each command, with --version in the place of files: what it checks is what `make check` runs."""
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    commands = {hook["id"]: shlex.split(hook["entry"]) for hook in hooks[0]["hooks"]}
    assert set(commands) == {"ruff", "mypy"} and all(hook["language"] == "system" for hook in hooks[0]["hooks"])
    for words in commands.values():
        done = subprocess.run([sys.executable, *words[1:3], "--version"], capture_output=True, text=True, check=False)
        assert words[0] == "python" and done.returncode == 0, done.stderr
        assert f"$(PY) {' '.join(words[1:3])}" in read("Makefile")
    bad = subprocess.run([sys.executable, *commands["ruff"][1:], "-"], input="import os\n", capture_output=True, text=True,
                         cwd=ROOT, check=False)
    assert bad.returncode == 1 and "F401" in bad.stdout


def test_contributing_is_short_and_names_files_that_exist():
    text = read("CONTRIBUTING.md")
    assert len(text.splitlines()) <= 120
    named = re.findall(r"`((?:flora|tests|docs|dev|csrc)/[\w./-]+)`", text)
    assert len(named) > 5 and [name for name in named if not (ROOT / name).exists()] == []

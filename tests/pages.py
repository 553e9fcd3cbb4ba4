"""The code blocks of README.md and of the pages in docs/, the marker of those that cannot run, and the commands in them."""
import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tiny import ROOT

import flora

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- not run: (?P<why>[^>]+) -->\n\n?)?^```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```$", re.S | re.M)
SHELL = ("", "bash", "console", "sh")
PLACEHOLDER = re.compile(r"\.\.\.|…|[\[\]]|\b[A-Z]{2,}\b")


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, first line, language, text, and why it is not run ("": it is)."""
    page: Path
    line: int
    kind: str
    code: str
    why: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def compiled(self):
        """The code with the page's own line numbers in a traceback."""
        tree = ast.increment_lineno(ast.parse(self.code), self.line)
        return compile(tree, str(self.page), "exec")


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("kind")) + 1
        found.append(Block(page, line, match["kind"], match["code"], (match["why"] or "").strip()))
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a shell block: prompts and comments gone, continued lines joined, one for each side of &&."""
    if block.kind not in SHELL:
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*$", "", line).removeprefix("$ ").split("&&")]
    return [part for part in parts if part]


def flora_words(command: str) -> list[str] | None:
    """The words after `flora` of a command that calls it, by name or as a module; None for any other."""
    if not re.match(r"(?:[A-Z_]+=\S+ )*flora (?!/)|.*\bflora\.cli\b", command):
        return None
    words = shlex.split(command.replace("[", " ").replace("]", " "))
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if "flora.cli" in words:
        return words[words.index("flora.cli") + 1:]
    return words[1:] if words and words[0] == "flora" else None


def is_pattern(command: str) -> bool:
    """Whether a command shows the form of a call, with words in capitals or in brackets to be filled in."""
    return bool(PLACEHOLDER.search(command))


def source(module: str) -> Path:
    """The file of a module of ours."""
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


def imported(block: Block) -> list[tuple[str, str]]:
    """(module of ours, name) of every `from flora... import name` of a Python block."""
    return [(node.module, alias.name) for node in ast.walk(ast.parse(block.code))
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flora" for alias in node.names]


def defined(module: str) -> set[str]:
    """The names that a module of ours has at its top level, read and not imported (flora itself is light, and lazy)."""
    if module == "flora":
        return set(dir(flora))
    names = {one.stem for one in ROOT.joinpath(*module.split(".")).glob("*.py")}
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names

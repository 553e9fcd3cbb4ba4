"""What README.md and docs/ show works: Python runs, run configs are valid, commands have verbs, options and files that exist."""
import contextlib
import importlib
import re
import shutil
from pathlib import Path

import pytest
import yaml
from page_setups import SETUPS, prepare
from pages import PAGES, Block, blocks, commands, defined, flora_words, imported, is_pattern
from tiny import ROOT

from flora.cli import VERBS, main, usage
from flora.config import RunConfig, parse
from flora.strategies import STRATEGIES

ALL = [block for page in PAGES for block in blocks(page)]
RUN = [page for page in PAGES if any(b.kind == "python" and not b.why for b in blocks(page))]
NOT_RUN = 6                                                     # of all pages: each says why
ACTS = {"run": ("flora.engines.local", "run"), "resume": ("flora.engines.local", "resume"),
        "compare": ("flora.comparison", "compare"),
        "verify": ("flora.verification", "verify"), "partition": ("flora.skew", "label_skew"),
        "fetch": ("flora.verbs.machine", "print"),
        "merge": ("flora.shards", "merge_files"), "export": ("flora.exporting", "export"), "init": ("flora.starter", "init"),
        "tune": ("flora.kernels", "use"), "doctor": ("flora.doctor", "show"),
        "eval": ("flora.evaluation", "eval_model"), "chat": ("flora.conversation", "open_outcome")}


class Acted(BaseException):                                    # main turns every Exception into a message
    """A verb has read all its words and would begin."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    prepare(folder)
    return folder


@pytest.fixture
def reader(written, tmp_path, monkeypatch):
    """The reader's folder as the current one: nothing is downloaded."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    before = dict(STRATEGIES)
    yield tmp_path
    STRATEGIES.clear()                                          # a page adds one
    STRATEGIES.update(before)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_python_of_a_page_runs(page, reader):
    if any("from peft" in block.code for block in blocks(page)):
        pytest.importorskip("peft", reason=f"peft is not installed: {name(page)} was not run")
    space = {"__name__": "page", **SETUPS.get(page.stem, lambda place: {})(reader)}
    for block in blocks(page):
        if block.kind == "python" and not block.why:
            exec(block.compiled, space)


def test_the_table_of_the_limit_is_what_its_code_gives(capsys):
    page = ROOT / "docs" / "kernels.md"
    exec(next(block for block in blocks(page) if "PEAK" in block.code).compiled, {})
    rows = re.findall(r"^\| (\d+ × .*) \|$", page.read_text(encoding="utf-8"), re.M)
    assert [re.findall(r"\d+", row) for row in rows] == [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_tutorial_shows_the_demo_s_own_settings():
    shown = next(block.code for block in blocks(ROOT / "docs" / "tutorial-demo.md") if block.kind == "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "flora" / "demo.yaml").read_text(encoding="utf-8"))


def test_the_readme_shows_the_layer_and_the_aggregation():
    first, second = (block.code for block in blocks(PAGES[0]) if block.kind == "python")
    assert "flora.attach" in first and "flora.aggregate" in second


def test_the_readme_s_file_tree_exists():
    tree = next(block.code for block in blocks(PAGES[0]) if block.code.startswith("flora/"))
    paths = re.findall(r"(?:^|\s)((?:flora|csrc|examples|benchmarks|tests|docs|dev)/[\w./]*)", tree)
    assert len(paths) > 15 and [path for path in paths if not (ROOT / path).exists()] == []


def test_few_blocks_are_not_run_and_each_says_why():
    left_out = [block for block in ALL if block.why]
    assert len(left_out) <= NOT_RUN, [block.place for block in left_out]
    assert all(block.kind == "python" and len(block.why) > 20 for block in left_out)


@pytest.mark.parametrize("block", [b for b in ALL if b.kind == "python"], ids=lambda b: b.place)
def test_what_a_block_imports_of_flora_is_there(block: Block):
    """Also of blocks that cannot run here: read from the source, without the packages that they need."""
    compile(block.code, block.place, "exec")
    assert [f"{module}.{one}" for module, one in imported(block) if one not in defined(module)] == []


@pytest.mark.parametrize("block", [b for b in ALL if b.kind == "yaml"], ids=lambda b: b.place)
def test_yaml_is_a_run_config(block: Block):
    settings = yaml.safe_load(block.code)
    assert settings and isinstance(parse(settings, block.place), RunConfig)


CALLS = sorted({(words[0], command): block.place for block in ALL for command in commands(block)
                if (words := flora_words(command))}.items())


def options_of(text: str) -> set[str]:
    return {option.replace("_", "-") for option in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", text)}


@pytest.mark.parametrize(("verb", "command", "place"), [(*call, place) for call, place in CALLS], ids=lambda text: text[:60])
def test_a_command_has_the_words_that_its_verb_reads(verb, command, place, reader, monkeypatch, capsys):
    """The verb's own parser reads it, up to the act; a line that shows the form of a call is held against the help."""
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in flora_words(command)]
    if verb.startswith("-"):
        assert main(words) == 0
        return
    assert verb in VERBS, place
    if is_pattern(command) or verb not in ACTS:
        keys = help_of("run", capsys) if verb in ("compare", "partition") else ""
        assert options_of(command) - {"--key"} <= options_of(usage() + help_of(verb, capsys) + keys), place
        return
    module = importlib.import_module(ACTS[verb][0])
    monkeypatch.setattr(module, ACTS[verb][1], acted, raising=False)
    monkeypatch.setattr("flora.engines.plan.plan", acted)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(Acted):
        main(words)


def acted(*given, **options):
    raise Acted


def help_of(verb: str, capsys) -> str:
    """What `flora VERB --help` prints."""
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_verbs_and_targets_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)) <= targets
    assert set(re.findall(r"`flora (\w+)[ `]", text)) <= set(VERBS)
    named = re.findall(r"(?<![\w/.])((?:flora|csrc|examples|benchmarks|tests|docs|dev)/[\w./-]*\w)", text)
    named += [one.replace(".", "/") + ".py" for one in re.findall(r"python -m (benchmarks\.[\w.]*\w)", text)]
    assert sorted({one for one in named if not exists(one)}) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem.startswith("extend-")], ids=name)
def test_the_names_that_a_guide_for_changes_uses_are_in_the_code(page):
    files = [path for folder in ("flora", "csrc", "tests") for path in (ROOT / folder).rglob("*.*")]
    code = " ".join(path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".cpp", ".h"))
    named = set(re.findall(r"`([A-Za-z_]\w*[_A-Z]\w*|[a-z]+)`", page.read_text(encoding="utf-8")))
    assert len(named) > 10 and sorted(one for one in named if not re.search(rf"\b{one}\b", code)) == []


def exists(path: str) -> bool:
    return any((ROOT / form).exists() for form in (path, f"{path}.py")) or path.startswith("flora/tuned")


def test_every_page_is_in_the_menu_once():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def files(menu):
        for entry in menu:
            for where in entry.values() if isinstance(entry, dict) else [entry]:
                yield from [where] if isinstance(where, str) else files(where)

    assert sorted(files(site["nav"])) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])

"""Every verb: its help, its equivalent in Python, what completes it, and what is said when something nobody foresaw goes wrong."""
import inspect
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import ROOT, python

import flora
from flora import options
from flora.cli import VERBS, main
from flora.options import Parser, key_options

CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_its_options_and_examples_that_parse(verb, capsys):
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    parser = Parser(verb, VERBS[verb].declare.__doc__)
    VERBS[verb].declare(parser)
    assert said.startswith(f"usage: flora {verb}") and VERBS[verb].declare.__doc__.splitlines()[0] in said
    assert all(name in said for action in parser._actions for name in action.option_strings)
    assert all(action.help for action in parser._actions if action.dest not in ("dtype", "shell"))
    examples = [line.strip() for line in said.partition("\nexamples:\n")[2].splitlines() if line.strip().startswith("flora ")]
    assert examples
    for example in examples:
        words = re.split(r"\s*>|\s{2,}", example)[0].replace('"', "'").split("'")
        words = [word for i, part in enumerate(words) for word in ([part] if i % 2 else part.split())]
        assert words[1] == verb and parser.parse(words[2:])


def test_the_help_of_a_verb_loads_neither_torch_nor_what_runs_need():
    code = ("import sys\nfrom flora.cli import VERBS, main\n"
            "for verb in VERBS:\n    main([verb, '-h']) if verb != 'run' else None\n"
            "assert not {'torch', 'numpy', 'transformers', 'pydantic', 'tyro', 'rich', 'shtab'} & set(sys.modules)\n"
            "main(['run', '-h'])\nassert not {'torch', 'numpy', 'transformers'} & set(sys.modules)")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_a_function_with_types_and_a_docstring_and_a_line_in_the_documentation():
    rows = dict(re.findall(r"^\| `flora ([a-z]+)` \|.*\| `flora\.(\w+)\(", CLI, re.M))
    assert rows == {name: verb.python for name, verb in VERBS.items()}
    for verb in VERBS.values():
        function = getattr(flora, verb.python)
        signature = inspect.signature(function)
        assert verb.python in flora.__all__ and function.__doc__ and signature.return_annotation is not inspect.Parameter.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), function


def test_run_without_a_word_is_the_demo_and_says_so(monkeypatch, capsys):
    from flora.engines import local, plan

    seen = []
    monkeypatch.setattr(local, "run", seen.append)
    assert main(["run"]) == 0
    said = capsys.readouterr().err
    assert seen[0].output_dir == "runs/demo" and seen[0].ranks() == [64, 32, 16, 16, 8, 8, 4, 4]
    assert said.count("\n") == 1 and str(ROOT / "flora" / "demo.yaml") in said and "flora init my-run" in said
    monkeypatch.setattr(plan, "plan", lambda config: seen.append(config))
    monkeypatch.setattr(plan, "show", lambda config, made: None)
    assert main(["run", "--dry-run"]) == 0 and seen[-1] == seen[0]
    assert main(["run", "--num_rounds", "1"]) == 0 and seen[-1].output_dir == "runs/flora"      # options alone: the defaults
    assert "demo" not in capsys.readouterr().err.partition("\n")[2]


@pytest.mark.parametrize(("error", "says"), [
    (KeyError("who"), "unexpected, a bug of flora or of what it calls: KeyError: 'who'. Please report it with the traceback: flora "
                      "--debug doctor"),
    (PermissionError(13, "Permission denied", "/x"), "cannot read or write: PermissionError"),
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory"), "Lower per_device_train_batch_size")], ids=str)
def test_what_nobody_foresaw_is_one_paragraph_and_exit_code_1(monkeypatch, capsys, error, says):
    from flora import doctor

    def fail():
        raise error

    monkeypatch.setattr(doctor, "show", fail)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("flora: ") and says in said and said.count("\n") == 1
    with pytest.raises(type(error)):
        main(["--debug", "doctor"])


def test_ctrl_c_says_how_to_go_on_only_where_something_goes_on(monkeypatch, capsys):
    from flora import doctor

    monkeypatch.setattr(doctor, "show", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["doctor"]) == 130 and capsys.readouterr().err == "\nflora: stopped.\n"


@pytest.mark.parametrize("words", ["--help", "run --help", "fetch"])
def test_a_reader_that_goes_away_is_no_error(words):
    """The pipe is closed before a word is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "flora.cli", *words.split()], stdout=write, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_tyros_boxes_become_a_sentence():
    box = "╭─ Value error ─╮\n│ Error parsing --x: no  │\n│ number. │\n│ ────── │\n│ help │\n╰───╯\n"
    assert options._sentence(box) == "Error parsing --x: no number"


def complete(script, *words):
    """What bash offers for the last of these words."""
    ask = ('. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
           '$(complete -p flora | sed "s/.*-F \\([^ ]*\\).*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", ask, "bash", script, "flora", *words], capture_output=True, text=True, timeout=30,
                          cwd=script.parent)
    assert done.stderr == "", done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here, so not tested: completion in it")
def test_bash_completes_verbs_options_keys_choices_and_folders(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "flora.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "runs-1").mkdir()
    (tmp_path / "config.yaml").write_text("")
    assert set(VERBS) <= complete(script, "") and complete(script, "re") == {"resume", "report"}
    assert complete(script, "export", "--o") == {"--out"}
    assert complete(script, "merge", "--rounding", "") == {"nearest", "stochastic"}
    assert complete(script, "run", "--lora_") == {"--lora_r", "--lora_alpha", "--lora_dropout"}
    assert complete(script, "run", "config.yaml", "--partition.i") == {"--partition.iid"}
    assert complete(script, "resume", "run") == {"runs-1"} and complete(script, "run", "conf") == {"config.yaml"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_verb_and_key(shell):
    script = flora.completion_script(shell)
    assert all(verb in script for verb in VERBS) and "lora_alpha" in script and script != flora.completion_script("bash")
    with pytest.raises(flora.errors.ConfigError, match="expected bash, zsh or fish"):
        flora.completion_script("csh")


def test_keys_are_all_of_the_config_and_switches_can_be_taken_back():
    keys = key_options()
    assert {"--lora-r", "--partition.dirichlet-alpha", "--no-quiet", "--partition.no-iid"} <= set(keys) and len(keys) > 80


def test_tune_is_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1 and "expected an NVIDIA GPU" in capsys.readouterr().err


def test_doctor_gives_what_it_shows(monkeypatch):
    from flora import doctor

    found = {part: (here, cost) for part, here, cost in flora.diagnose()}
    assert torch.__version__ in found["torch"][0] and {"peft", "nvcc", "allocator"} <= set(found)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert ("peft", None, doctor.COSTS["peft"]) in flora.diagnose()

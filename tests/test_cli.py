"""The verbs as a person types them: exit codes, one paragraph an error, and how little is imported before it is needed."""
import json

import pytest
import yaml
from tiny import TARGETS, python, save_model, write_rows

from flora.cli import VERBS, main
from flora.data import SOURCES
from flora.report import read_metrics

HEAVY = ("torch", "numpy", "transformers", "pydantic", "datasets", "rich", "tyro", "peft", "yaml", "pandas", "pyarrow",
         "matplotlib", "huggingface_hub", "tokenizers", "triton", "scipy", "accelerate", "flwr", "nvflare")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny model, rows, and a config.yaml that names them."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 40)
    settings = {"model_name_or_path": "model", "dataset": "rows.jsonl", "num_clients": 3, "num_rounds": 1, "lora_r": 4,
                "max_steps": 1, "eval_rows_per_client": 2, "server_eval_rows": 4, "target_modules": list(TARGETS), "device": "cpu",
                "quiet": True, "output_dir": "out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def resolved(place):
    return yaml.safe_load((place / "out" / "config.yaml").read_text())


def loaded_after(code):
    """Which of the heavy packages a fresh process has imported after this code."""
    done = python("-c", f"import sys\n{code}\nimport json; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_help_imports_nothing_heavy():
    """So it answers at once: nothing of it takes longer than Python itself."""
    done = python("-m", "flora.cli", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"flora {verb}" in done.stdout for verb in ("run", "resume", "fetch", "doctor"))
    assert loaded_after("from flora.cli import main; main(['--help']); main(['--version']); main(['nonsense'])") == []


def test_import_flora_is_light_and_one_function_needs_torch_alone():
    assert loaded_after("import flora; dir(flora); flora.__version__") == []
    assert set(loaded_after("import flora; flora.stack; flora.Adapter")) <= {"torch", "numpy"}
    core = "import flora; flora.Cohort, flora.attach, flora.aggregate, flora.messages.decode, flora.ops.merge_, flora.server"
    assert set(loaded_after(core)) <= {"torch", "numpy"}


def test_what_flora_promises_by_name_is_there():
    import flora

    assert all(getattr(flora, name) is not None for name in flora.__all__) and set(flora.__all__) <= set(dir(flora))
    with pytest.raises(AttributeError, match="'flora' has no attribute 'stak'"):
        flora.stak  # noqa: B018


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"], ["--help"]], ids=str)
def test_help_in_all_its_forms(arguments, capsys):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in VERBS) and "Exit codes" in said


def test_version(capsys):
    import flora

    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{flora.__version__}\n"


@pytest.mark.parametrize(("arguments", "says"), [
    (["rum"], "no such verb: rum; did you mean run?"), (["qqq"], "no such verb: qqq. flora --help"),
    (["resume"], "required: FOLDER"), (["resume", "a", "b"], "expected no more words; got b"),
    (["export", "x", "--outt", "y"], "no such option: --outt; did you mean --out?"), (["export", "x"], "required: --out"),
    (["eval"], "required: FOLDER"), (["eval", "x", "--rows", "many"], "--rows: invalid int value: 'many'"),
    (["chat", "x", "--promt", "y"], "did you mean --prompt?"),
    (["chat", "x", "--temperature", "hot"], "invalid float value: 'hot'"),
    (["verify"], "required: FOLDER"), (["merge", "x"], "required: FOLDER, --out"),
    (["merge", "x", "y", "--out", "z", "--rounding", "up"], "invalid choice: 'up'"), (["fetch", "--all"], "no such option: --all"),
    (["init"], "required: DIR"), (["init", "flower"], "expected a folder after flower"), 
    (["doctor", "now"], "no more words; got now"),
    (["tune", "--rows", "x"], "expected a whole number from 1; got 'x'"), (["tune", "--shapes", "8"], "expected out x in"),
    (["bench", "--quik"], "did you mean --quick?"), (["completion", "csh"], "invalid choice: 'csh'"),
    (["compare"], "required: --strategies"), (["compare", "--strategies", "flora", "--seed_s", "1"], "did you mean --seeds?"),
    (["compare", "--strategies", "flora", "--seeds", "a"], "expected numbers"),
    (["partition", "--groups", "x"], "--groups: invalid int value"),
    (["run", "--nonsense", "3"], "no such option: --nonsense."), (["run", "--num_rouns", "3"], "did you mean --num-rounds?"),
    (["run", "--partition.bye", "x"], "did you mean --partition.by?"),
    (["run", "--num_rounds", "many"], "invalid literal for int"),
    (["run", "--dtype", "int8"], "--dtype"), (["run", "--no-quiet", "extra"], "extra")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_usage_is_exit_code_2_and_one_paragraph(tmp_path, monkeypatch, arguments, says, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.startswith("flora") and out.err.count("\n") == 1 and out.out == ""
    assert len(out.err) < 500 and not list(tmp_path.iterdir())


def test_run_help_lists_every_key_with_its_meaning(capsys):
    from flora.config import RunConfig
    from flora.options import FILE_ONLY

    assert main(["run", "--help"]) == 0
    said = capsys.readouterr().out.replace("_", "-")
    keys = [*(name for name in RunConfig.model_fields if name not in ("partition", "fleet_memory", *FILE_ONLY)), "partition.by",
            "partition.dirichlet-alpha", "fleet-memory.base-mb"]
    assert [key for key in keys if f"--{key.replace('_', '-')}" not in said] == []
    assert "one for all, or a list" in said


def test_run_with_a_file_and_with_options_over_it(place, capsys):
    """Lists are words after the option; nested keys have a dot; a switch is a switch, without True."""
    assert main(["run", "config.yaml", "--lora_r", "8", "4", "--num_clients", "2", "--partition.by", "who", "--lora-alpha", "r",
                 "--target_modules", "q_proj", "v_proj", "--fraction_train", "1.0", "--overwrite", "--strategy", "zeropad",
                 "--no-quiet", "--report_to", "none"]) == 0
    got = resolved(place)
    assert (got["lora_r"], got["lora_alpha"], got["partition"]["by"]) == ([8, 4], "r", "who")
    assert got["target_modules"] == ["q_proj", "v_proj"]
    assert (got["max_steps"], got["strategy"], got["learning_rate"]) == (1, "zeropad", 3e-4)
    rows = [row for row in read_metrics("out") if row["kind"] == "client"]
    assert [(row["client"], row["rank"], row["alpha"]) for row in rows] == [("p0", 8, 8.0), ("p1", 4, 4.0)]
    said = capsys.readouterr().out
    assert "global model" in said and "out/model" in said.replace("\n", "") and "p1" in said


def test_run_with_options_alone(place, capsys):
    assert main(["run", "--model_name_or_path", "model", "--dataset", "rows.jsonl", "--num_clients", "2", "--num_rounds", "1",
                 "--lora_r", "2", "--max_steps", "1", "--eval_rows_per_client", "0", "--server_eval_rows", "4", "--device", "cpu",
                 "--quiet", "--partition.iid", "--profile", "--output_dir", "out"]) == 0
    assert capsys.readouterr() == ("out\n", "") and (place / "out/profile/trace.json.gz").exists()
    got = resolved(place)
    assert got["partition"]["iid"] is True and got["quiet"] is True and got["lora_r"] == 2
    assert all(row["eval_loss_before"] is None for row in read_metrics("out") if row["kind"] == "client")


@pytest.mark.parametrize(("arguments", "says"), [
    (["run", "none.yaml"], "expected a YAML file at none.yaml"), (["run", "bad.yaml"], "did you mean lora_r?"),
    (["run", "config.yaml", "--lora_r", "0"], "lora_r: .*greater than 0; got 0"),
    (["run", "config.yaml", "--lora_r", "8", "4"], "one a client (3); got 2"),
    (["run", "config.yaml", "--partition.by", "who", "--partition.iid"], "partition: expected"),
    (["run", "config.yaml", "--dataset", "./no.jsonl"], "./no.jsonl"),
    (["run", "config.yaml", "--strategy", "flor"], "Did you mean 'flora'"), (["resume", "nowhere"], "nowhere/config.yaml"),
    (["fetch", "chitchatt"], "chitchatt"), (["verify", "nowhere"], "the folder of a run at nowhere"),
    (["export", "nowhere", "--out", "x"], "a finished run at nowhere"), (["eval", "nowhere"], "got nowhere, which is none"),
    (["chat", "nowhere", "--prompt", "x"], "got nowhere, which is none"), (["eval", "model"], "--data"),
    (["eval", "model", "--data", "no.jsonl"], "no.jsonl"), (["eval", "model", "--client", "x"], "the folder of a run, which has"),
    (["eval", "model", "--data", "rows.jsonl", "--json", "no/where.json"], "--json: expected a file that can be written"),
    (["eval", "model", "--data", "rows.jsonl", "--device", "cuda:77"], "cuda:77"),
    (["chat", "model", "--prompt", "w1", "--max-new-tokens", "64"], "max_new_tokens below the model's 64 positions"),
    (["chat", "model", "--prompt", "w1", "--max-new-tokens", "0"], "max_new_tokens of at least 1"),
    (["chat", "model", "--prompt", "w1", "--max-new-tokens", "4", "--temperature", "-1"],
     "a temperature of at least 0"),
    (["merge", "model", "nowhere", "--out", "merged"], "PEFT folder"), (["init", "flour", "app"], "expected flower, or a folder"),
    (["init", "model"], "expected a new or empty folder"), (["init", "flower", "app", "--model", "x"], "with a config alone"),
    (["init", "mine", "--data", "no.jsonl"], "no.jsonl"), (["bench", "mergee"], "did you mean merge?"),
    (["bench", "--show", "cohorts"], "did you mean cohort?"),
    (["compare", "none.yaml", "--strategies", "flora"], "none.yaml"), (["partition", "none.yaml"], "none.yaml")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_refusal_is_exit_code_1_and_one_paragraph(place, arguments, says, capsys):
    (place / "bad.yaml").write_text("lora_rr: 8\n")
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("flora: ") and said.count("\n") == 1 and "Traceback" not in said
    assert all(part in said for part in says.split(".*"))


@pytest.mark.parametrize("arguments", [["--debug", "run", "none.yaml"], ["run", "none.yaml", "--debug"]], ids=str)
def test_debug_shows_the_traceback_wherever_it_stands(place, arguments):
    done = python("-m", "flora.cli", *arguments, cwd=place)
    assert done.returncode == 1 and "Traceback" in done.stderr and "flora.errors.ConfigError" in done.stderr


def test_ctrl_c_is_exit_code_130_and_resume_goes_on(place, monkeypatch, capsys):
    from flora.report import Report

    with monkeypatch.context() as patch:
        patch.setattr(Report, "on_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["run", "config.yaml"]) == 130
    assert "flora resume" in capsys.readouterr().err and json.loads((place / "out/run.json").read_text())["state"] == "interrupted"
    assert main(["run", "config.yaml"]) == 1 and "holds a run already" in capsys.readouterr().err
    assert main(["resume", "out"]) == 0 and json.loads((place / "out/run.json").read_text())["state"] == "finished"
    assert main(["resume", "out"]) == 1 and "nothing to resume" in capsys.readouterr().err


def test_fetch_without_a_name_lists_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "empty"))
    assert main(["fetch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES) and all("not fetched" in line and " MB" in line for line in lines)
    assert not (tmp_path / "empty").exists()


def test_doctor_says_what_is_here_and_what_runs(monkeypatch, capsys):
    import torch

    from flora import doctor, kernels

    monkeypatch.setenv("COLUMNS", "240")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    for operator, device, backend, _ in kernels.table():
        assert any({operator, device, backend} <= set(line.split()) for line in said.splitlines()), (operator, device, backend)
    with kernels.use("reference"):
        assert main(["doctor"]) == 0 and capsys.readouterr().out.count(" reference ") == len(kernels.table())
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr("shutil.which", lambda *_: None)
    assert main(["doctor"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("missing") >= len(doctor.COSTS) + 3 and "cannot be built" in said

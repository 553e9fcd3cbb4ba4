"""Whole runs on a tiny model: what lies in the run folder, and that its numbers are those of the model that was saved."""
import json
import shutil

import pytest
import torch
import yaml
from tiny import ROOT, TARGETS, adapter, llama, same, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import flora
from flora.checkpoint import RunFolder
from flora.data import load_rows, tokenize_rows
from flora.engines.prepare import prepare
from flora.errors import ConfigError, DataError, RunError, StrategyError
from flora.evaluate import evaluate
from flora.formats import load_peft
from flora.report import read_metrics, summary

RANKS = {"flora": [8, 4, 2, 1], "zeropad": [8, 4, 2, 1], "fedit": 4, "centralized": [8, 4, 2, 1], "standalone": [8, 4, 2, 1]}
STRATEGIES = sorted(RANKS)


def settings(place, name, strategy="flora", **changes):
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "strategy": strategy,
            "num_clients": 4, "num_rounds": 2, "lora_r": RANKS.get(strategy, 4), "max_steps": 8, "learning_rate": 1e-2,
            "lora_alpha": [16, 4, 8, 1] if strategy == "flora" else "2r", "eval_rows_per_client": 3, "server_eval_rows": 8,
            "target_modules": list(TARGETS), "quiet": True, "device": "cpu", "keep_rounds": 2,
            "output_dir": str(place / name), **changes}


@pytest.fixture(scope="module")
def runs(place):
    """One run of every strategy."""
    return {strategy: flora.run(settings(place, strategy, strategy)) for strategy in STRATEGIES}


def of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_run_folder_holds_what_it_promises(runs, place, strategy):
    folder = runs[strategy]
    names = ["everyone"] if strategy == "centralized" else [f"client-{k}" for k in range(4)]
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "model", "rounds", "run.json", "tensorboard"}
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert flora.config.parse(resolved) == flora.config.parse(settings(place, strategy, strategy))
    assert resolved["weighting"] == "examples" and "overwrite" not in resolved
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert (environment["commit"] is not None) == (ROOT / ".git").exists()
    assert {row["operator"] for row in environment["kernels"]} == set(flora.kernels.OPERATORS)
    assert json.loads((folder / "run.json").read_text()) == {"state": "finished", "rounds_done": 2}
    for number in "01":
        parts = folder / "rounds" / number
        assert sorted(p.name for p in (parts / "clients").iterdir()) == names
        assert (parts / "aggregate").exists() == (strategy != "standalone")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_have_the_keys_that_were_promised(runs, strategy):
    rows = read_metrics(runs[strategy])
    assert rows == [json.loads(line) for line in (runs[strategy] / "metrics.jsonl").read_text().splitlines()]
    assert [row["rounds_done"] for row in of(rows, "server")] == [0, 1, 2]
    for row in of(rows, "server"):
        assert {"eval_loss", "eval_accuracy", "eval_perplexity", "seconds", "bytes_up", "bytes_down"} <= set(row)
    ranks = {"centralized": [8], "fedit": [4] * 4}.get(strategy, [8, 4, 2, 1])
    assert [(r["round"], r["rank"]) for r in of(rows, "client")] == [(n, rank) for n in range(2) for rank in ranks]
    for row in of(rows, "client"):
        assert {"client", "loss", "tokens_per_second", "bytes_up", "bytes_down", "eval_loss_before", "eval_loss_after"} <= set(row)
        assert row["steps"] == (32 if strategy == "centralized" else 8) and set(row["seconds"]) >= {"train", "evaluate"}
        assert (row["bytes_up"] > 0) == (strategy not in ("centralized", "standalone"))
    tables = summary(rows)
    assert [table.row_count for table in tables] == [3, len(ranks)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_falls_every_round(runs, strategy):
    losses = [row["eval_loss"] for row in of(read_metrics(runs[strategy]), "server")]
    assert losses[0] > losses[1] > losses[2] > 0
    assert all(row["eval_loss_after"] < row["eval_loss_before"] for row in of(read_metrics(runs[strategy]), "client"))


@pytest.mark.parametrize("strategy", ["flora", "fedit", "zeropad", "centralized"])
def test_the_merged_model_gives_the_last_loss(runs, place, strategy):
    """flora merged as it went: the same bits. The averages were evaluated as adapters and merged at the end: in fp32 that
    is some roundings of 6e-8 in another order."""
    model = AutoModelForCausalLM.from_pretrained(runs[strategy] / "model")
    loaded = AutoTokenizer.from_pretrained(runs[strategy] / "model")
    config = flora.config.parse(settings(place, "x", strategy))
    job = prepare(config, lambda text: None)
    held_out = job.server_rows
    rows = load_rows(config.dataset)[:3]
    assert tokenize_rows(loaded, rows, 512) == tokenize_rows(tokenizer(), rows, 512)
    got, last = evaluate(model, held_out, 8), of(read_metrics(runs[strategy]), "server")[-1]
    assert got["accuracy"] == last["eval_accuracy"]
    assert got["loss"] == last["eval_loss"] if strategy == "flora" else got["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["flora", "fedit"])
def test_a_saved_client_adapter_gives_the_same_logits_in_peft(runs, place, strategy):
    from peft import PeftModel

    ids = torch.arange(4, 16)[None]
    for client in ("client-0", "client-3"):
        path = runs[strategy] / "rounds" / "0" / "clients" / client
        adapters = load_peft(path)
        with torch.no_grad(), flora.nn.applied(model := llama(), adapters):
            ours = model(ids).logits
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(llama(), path)(ids).logits
            plain = llama()(ids).logits
        assert float((ours - theirs).abs().max()) < 1e-5 < 1e-2 < float((plain - theirs).abs().max())    # fp32, |logit| ~ 5


def test_the_saved_stack_is_the_weighted_sum_of_the_saved_clients(runs):
    """Through PEFT's one scale a module: fp32 products and sums, against fp64."""
    folder = runs["flora"] / "rounds" / "0"
    examples = {row["client"]: row["num_examples"] for row in of(read_metrics(runs["flora"]), "client") if row["round"] == 0}
    clients = {name: load_peft(folder / "clients" / name) for name in examples}
    for layer, stack in load_peft(folder / "aggregate").items():
        exact = sum(count / sum(examples.values()) * clients[name][layer].delta() for name, count in examples.items())
        assert stack.rank == 15 and float((stack.delta() - exact).norm() / exact.norm()) < 1e-6


def folders_agree(one, other, what="rounds"):
    """The same adapter files with the same bytes."""
    files = sorted(p.relative_to(one) for p in (one / what).rglob("*.safetensors"))
    assert files and files == sorted(p.relative_to(other) for p in (other / what).rglob("*.safetensors"))
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize("strategy", ["flora", "zeropad", "standalone"])
def test_the_same_seed_gives_the_same_bits(runs, place, strategy):
    again = flora.run(settings(place, f"{strategy}-again", strategy))
    assert folders_agree(runs[strategy], again) and folders_agree(runs[strategy], again, "model")
    key = [(r.get("client"), r.get("eval_loss"), r.get("loss")) for r in read_metrics(runs[strategy])]
    assert key == [(r.get("client"), r.get("eval_loss"), r.get("loss")) for r in read_metrics(again)]
    other = flora.run(settings(place, f"{strategy}-other", strategy, seed=1, num_rounds=1, keep_rounds=1))
    assert not folders_agree(runs[strategy] / "rounds" / "0", other / "rounds" / "0", ".")


def test_keep_rounds_keeps_the_last_ones_or_none(place):
    assert [p.name for p in (flora.run(settings(place, "keep1", keep_rounds=1, max_steps=1)) / "rounds").iterdir()] == ["1"]
    assert not (flora.run(settings(place, "keep0", keep_rounds=0, max_steps=1)) / "rounds").exists()


def test_a_fraction_of_the_clients_trains_and_the_stack_is_theirs(place):
    folder = flora.run(settings(place, "half", fraction_train=0.5, num_rounds=3, max_steps=2, keep_rounds=3))
    rows = of(read_metrics(folder), "client")
    rounds = [[row["client"] for row in rows if row["round"] == number] for number in range(3)]
    assert [len(names) for names in rounds] == [2, 2, 2] and len({tuple(names) for names in rounds}) > 1
    for number in range(3):
        rank = sum(row["rank"] for row in rows if row["round"] == number)
        assert {a.rank for a in load_peft(folder / "rounds" / str(number) / "aggregate").values()} == {rank}


def test_epochs_bf16_and_a_partition_by_people(place):
    folder = flora.run(settings(place, "bf16", max_steps=None, num_train_epochs=1, dtype="bfloat16", partition={"by": "who"},
                                num_rounds=1, weighting="uniform", lora_dropout=0.1, warmup_steps=1, lr_scheduler_type="cosine"))
    rows = read_metrics(folder)
    assert [row["client"] for row in of(rows, "client")] == ["p0", "p1", "p2", "p3"]
    assert all(row["steps"] == -(-row["num_examples"] // 4) for row in of(rows, "client"))
    assert AutoModelForCausalLM.from_pretrained(folder / "model").dtype == torch.bfloat16
    scales = load_peft(folder / "rounds" / "0" / "aggregate")
    assert all(a.rank == 15 for a in scales.values())


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"num_clients": 5, "lora_r": 4, "lora_alpha": 8, "partition": {"by": "who"}}, DataError, "at most 4"),
    ({"partition": {"by": "whom"}}, DataError, "'whom'.*completion, mood, prompt, who"),
    ({"num_clients": 61, "lora_r": 4, "lora_alpha": 8}, DataError, "61 clients cannot share 60 rows"),
    ({"partition": {"dirichlet_alpha": 1e-6, "label": "mood"}}, DataError, "without a row"),
    ({"partition": {"dirichlet_alpha": 1.0}}, (DataError, ConfigError), "label"),
    ({"dataset": "./nowhere.jsonl"}, DataError, "nowhere.jsonl"), ({"model_name_or_path": "./nowhere"}, DataError, "nowhere"),
    ({"target_modules": ["query"]}, flora.errors.TargetError, "'query'.*q_proj"), ({"device": "cuda:99"}, ConfigError, "device"),
    ({"strategy": "flor"}, StrategyError, "Did you mean 'flora'"),
    ({"strategy": "fedit", "lora_r": [8, 4, 2, 1]}, StrategyError, "flora.*zeropad"),
    ({"lora_r": 0}, ConfigError, "lora_r")], ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_bad_input_is_refused_and_the_same_folder_can_be_used_again(place, changes, error, says):
    with pytest.raises(error, match=says):
        flora.run(settings(place, "refused", **changes))
    assert not (place / "refused" / "model").exists() and not (place / "refused" / "rounds").exists()
    kept = place / "refused" / "notes.txt"
    if kept.parent.exists():
        kept.write_text("mine")
        RunFolder(place / "refused")                            # nothing came of it, so nothing is in the way, and nothing is lost
        assert kept.read_text() == "mine"
    shutil.rmtree(kept.parent, ignore_errors=True)


def test_every_setting_of_training_reaches_the_clients(place):
    given = {"learning_rate": 0.5, "max_steps": 7, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "seed": 9,
             "max_grad_norm": 0.25, "weight_decay": 0.125, "warmup_steps": 1, "lr_scheduler_type": "linear", "lora_dropout": 0.5,
             "gradient_checkpointing": True, "adapter_dtype": "bfloat16"}
    job = prepare(flora.config.parse(settings(place, "x", **given, max_examples_per_client=5)), lambda text: None)
    assert {name: getattr(job.train_config, name) for name in given} == given and job.train_config.pad_token_id == 0
    assert [(c.rank, c.alpha, len(c.rows)) for c in job.clients] == [(8, 16, 5), (4, 4, 5), (2, 8, 5), (1, 1, 5)]
    longer = flora.config.parse({**settings(place, "x"), "max_steps": None, "num_train_epochs": 2.5})
    assert prepare(longer, lambda text: None).train_config.num_train_epochs == 2.5


def test_a_folder_that_holds_a_run_is_refused_unless_overwritten(place):
    config = settings(place, "once", num_rounds=1, max_steps=1)
    folder = flora.run(config)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="holds a run already.*--overwrite"):
        flora.run(config)
    with pytest.raises(DataError, match="nowhere"):             # the old run goes only when the new one can start
        flora.run({**config, "overwrite": True, "dataset": "./nowhere.jsonl"})
    assert (folder / "metrics.jsonl").read_bytes() == before and (folder / "model").exists()
    (folder / "rounds" / "7").mkdir()
    assert flora.run({**config, "overwrite": True}) == folder and not (folder / "rounds" / "7").exists()


@pytest.mark.parametrize("content", [None, "{}", '{"state": "done"}', '{"state": "x", "rounds_done": 1}', "[1]", "half"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_foreign_folder_is_never_deleted(place, content, overwrite):
    """Nor one with another program's run.json."""
    mine = place / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "thesis.tex").write_text("years")
    (mine / "run.json").unlink(missing_ok=True)
    if content:
        (mine / "run.json").write_text(content)
    with pytest.raises(RunError, match="not a run of flora"):
        flora.run(settings(place, "mine", overwrite=overwrite))
    assert (mine / "thesis.tex").read_text() == "years" and len(list(mine.iterdir())) == 1 + bool(content)
    with pytest.raises(RunError, match="not a run of flora"):
        flora.run(settings(place, "rows.jsonl", overwrite=True))


def test_same_is_not_fooled():
    one = {"l": adapter(2, (3, 4))}
    assert same(one, one) and not same(one, {"l": adapter(2, (3, 4), 1)}) and not same(one, {"m": one["l"]})

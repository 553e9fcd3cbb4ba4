"""What came of a run is seen through one model: eval's numbers are the run's own, chat's answers those of each model alone."""
import io
import json

import pytest
import torch
from test_engines import settings
from tiny import llama, tokenizer, write_rows

import flora
from flora import conversation, evaluation, outcome
from flora.cli import main
from flora.conversation import Conversation, Sampling, converse
from flora.data import load_model
from flora.errors import ConfigError, DataError, RunError
from flora.evaluate import evaluate, generate
from flora.formats import save_peft
from flora.nn import applied
from flora.outcome import open_outcome
from flora.report import client_named, read_metrics

RUNS = {"flora": {}, "one round": {"num_rounds": 1}, "warm": {"start": "warm"},
        "beside": {"merge_into": "adapter", "start": "warm"}, "fedit": {"strategy": "fedit", "lora_r": 4},
        "hetlora": {"strategy": "hetlora"}, "full rank": {"strategy": "flexlora"},
        "fedex": {"strategy": "fedex", "lora_r": 4}, "short": {"num_hidden_layers": 1},
        "sampled": {"fraction_train": 0.5, "num_rounds": 4, "keep_rounds": 4},
        "sampled warm": {"fraction_train": 0.5, "num_rounds": 4, "keep_rounds": 4, "start": "warm"}}


@pytest.fixture(scope="module")
def run(place):
    return flora.run(settings(place, "run"))


def close(one, other):
    return one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_eval_gives_what_the_run_has_measured(place, name):
    """The base, the global model, and every client's own model of the round in which it trained last."""
    folder = flora.run(settings(place, name.replace(" ", "-"), overwrite=True, **RUNS[name]))
    rows = read_metrics(folder)
    trained = {row["client"]: row for row in rows if row["kind"] == "client"}
    server = [row for row in rows if row["kind"] == "server"]
    found = {(row["model"], row["data"]): row for row in flora.eval_model(folder, clients=list(trained), with_base=True)}
    assert len(found) == 2 * (1 + len(trained)) + len(trained)
    for view, row in (("base", server[0]), ("global", server[-1])):
        mine = found[view, "server"]
        assert close(mine["loss"], row["eval_loss"]) and close(mine["perplexity"], row["eval_perplexity"]) and mine["rows"] == 8
        assert mine["accuracy"] == row["eval_accuracy"]
    for client, row in trained.items():
        assert close(found[client, client]["loss"], row["eval_loss_after"]) and found[client, client]["rows"] == 3
        assert abs(row["eval_loss_after"] - found["global", client]["loss"]) > 1e-4         # another model than the global one


def test_the_beginning_of_a_clients_name_is_enough_where_no_other_has_it(tmp_path, run):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"kind": "client", "client": name}) + "\n" for name in (
        "5f2e", "5fa1", "9c", "9c77")))
    assert [client_named(tmp_path, word) for word in ("5f2", "9c", "9c7", "zz")] == ["5f2e", "9c", "9c77", "zz"]
    with pytest.raises(RunError, match=r"'5f' begins 2: 5f2e, 5fa1"):
        client_named(tmp_path, "5f")
    assert list(open_outcome(run, ["client-0"]).views)[-1] == "client-0"
    with pytest.raises(RunError, match="'client-' begins"):
        flora.eval_model(run, clients=["client-"])
    with pytest.raises(RunError, match="'client-' begins"):
        flora.export(run, tmp_path / "out", "client-")


def test_clients_with_factors_at_home_are_evaluated_one_by_one(place):
    folder = flora.run(settings(place, "fedsa", "fedsa"))
    after = {row["client"]: row["eval_loss_after"] for row in read_metrics(folder) if row["kind"] == "client"}
    with pytest.raises(RunError, match="expected a client: with fedsa"):
        flora.eval_model(folder)
    [row] = flora.eval_model(folder, clients=["client-2"])
    assert (row["model"], row["data"]) == ("client-2", "client-2") and close(row["loss"], after["client-2"])


def test_labels_and_answers_are_scored_as_in_the_run(place):
    rows = [{"prompt": f"w{i % 12} w3", "completion": f"w{i % 3}", "label": f"w{i % 3}", "answer": f"w{i % 3}"} for i in range(60)]
    (place / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = flora.run(settings(place, "labelled", dataset=str(place / "labelled.jsonl"), evaluate=["labels", "answers"]))
    last = read_metrics(folder)[-1]
    client = next(row for row in read_metrics(folder)[::-1] if row.get("client") == "client-1")
    found = flora.eval_model(folder, clients=["client-1"])
    assert found[0]["label_accuracy"] == last["eval_label_accuracy"] and found[0]["exact_match"] == last["eval_exact_match"]
    assert found[2]["label_accuracy"] == client["eval_label_accuracy_after"]
    assert found[2]["exact_match"] == client["eval_exact_match_after"]
    [other] = flora.eval_model(folder, place / "labelled.jsonl", limit=5, settings={"evaluate": ["answers"]})
    assert other["rows"] == 5 and "label_accuracy" not in other and 0 <= other["exact_match"] <= 1


def test_a_model_and_an_adapter_folder(place, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    data, own = str(write_rows(tmp_path / "other.jsonl", 7, seed=3)), run / "rounds" / "1" / "clients" / "client-0"
    assert main(["eval", str(own), "--data", data, "--with-base", "--json", str(tmp_path / "o.json")]) == 0
    base, adapter = json.loads((tmp_path / "o.json").read_text())
    said = capsys.readouterr().out
    assert f"{adapter['loss']:.4f}" in said and data in said
    [plain] = flora.eval_model(place / "model", data)
    assert plain["loss"] == base["loss"] and plain["model"] == "model" and adapter["loss"] != base["loss"]
    model = load_model(place / "model")
    tokens = evaluation._rows_of(open_outcome(place / "model"), flora.data.load_rows(data)).rows
    with applied(model, flora.formats.load_peft(own)):
        assert close(evaluate(model, tokens)["loss"], adapter["loss"])
    save_peft(flora.formats.load_peft(own), tmp_path / "nameless", None)
    with pytest.raises(ConfigError, match="whose configuration names none. Say which: --base"):
        flora.eval_model(tmp_path / "nameless", data)
    assert main(["eval", str(tmp_path / "nameless"), "--base", str(place / "model"), "--data", data]) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_base_is_written_over_one_model_and_taken_back_to_the_bit(place, tmp_path, monkeypatch, architecture):
    changes = {}
    if architecture == "gpt2":                                  # its Conv1D holds (in, out)
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(tmp_path / "m")
        tokenizer().save_pretrained(tmp_path / "m")
        changes = {"model_name_or_path": str(tmp_path / "m"), "target_modules": "all-linear"}
    folder, loads = flora.run(settings(place, f"swap-{architecture}", overwrite=True, **changes)), []
    monkeypatch.setattr(outcome, "load_model", lambda *a: (loads.append(a), load_model(*a))[1])
    seen = open_outcome(folder, ["client-0"], True)
    trained = {name: weight.clone() for name, weight in seen.model.state_dict().items()}
    base = load_model(tmp_path / "m" if changes else place / "model").state_dict()
    assert list(seen.views) == ["base", "global", "client-0"] and len(loads) == 1
    with seen.seen("base") as model:
        assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items())
    with seen.seen("client-0") as model:
        assert any(".A" in name for name in model.state_dict())
    assert all(torch.equal(weight, trained[name]) for name, weight in seen.model.state_dict().items())
    assert any(not torch.equal(weight, base[name]) for name, weight in trained.items())


def test_what_cannot_be_seen_is_refused(place, run, tmp_path):
    with pytest.raises(RunError, match="an adapter of client 'nobody'"):
        flora.eval_model(run, clients=["nobody"])
    with pytest.raises(RunError, match="got a|none. Give the output_dir"):
        open_outcome(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="a run says what its base is"):
        open_outcome(run, settings={"model_name_or_path": "x"})
    with pytest.raises(ConfigError, match="expected --data with a number of rows"):
        flora.eval_model(run, limit=3)
    with pytest.raises(DataError, match="expected rows to evaluate"):
        flora.eval_model(place / "model")
    (tmp_path / "run.json").write_text('{"state": "interrupted", "rounds_done": 1}')
    with pytest.raises(RunError, match="got interrupted, 1 rounds. Go on with it: flora resume"):
        open_outcome(tmp_path)
    dense = flora.run(settings(place, "dense", downlink="dense"))
    assert len(flora.eval_model(dense)) == 1
    with pytest.raises(RunError, match="cannot take round 1 back"):
        flora.eval_model(dense, clients=["client-0"])
    bare = flora.run(settings(place, "no-rows", eval_rows_per_client=0))
    with pytest.raises(RunError, match="expected held-out rows of client-0"):
        flora.eval_model(bare, clients=["client-0"])


def test_chat_gives_each_models_own_greedy_answer(place, run, capsys):
    found = flora.chat(run, "w1 w2 w3", ["client-0"], Sampling(6))
    words = tokenizer()
    ids = words(words.apply_chat_template([{"role": "user", "content": "w1 w2 w3"}], tokenize=False, add_generation_prompt=True),
                add_special_tokens=False)["input_ids"]
    for name, folder in (("base", place / "model"), ("global", run / "model")):
        [answer] = generate(load_model(folder), [ids], 6, 0, [1])
        assert found[name] == words.decode(answer, skip_special_tokens=True).strip()
    assert list(found) == ["base", "global", "client-0"] and found["base"] != found["global"]
    assert main(["chat", str(run), "--client", "client-0", "--prompt", "w1 w2 w3", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr().out
    assert said == "".join(f"--- {name}\n{text or '(nothing)'}\n\n" for name, text in found.items())


def test_a_conversation_goes_on_and_begins_anew(run, monkeypatch, capsys):
    asked = []
    ids = conversation.tokenize_prompts

    def noted(tokenizer, rows, *more):
        asked.append(rows[0]["prompt"])
        return ids(tokenizer, rows, *more)

    monkeypatch.setattr(conversation, "tokenize_prompts", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n\n/what\nw3\n/clear\nw1 w2\n/quit\nw5\n"))
    converse(run, (), Sampling(4))
    said = capsys.readouterr().out
    assert said.count("--- base\n") == said.count("--- global\n") == 3 and "or /quit; got /what" in said and ">" not in said
    assert [prompt if isinstance(prompt, str) else len(prompt) for prompt in asked] == ["w1 w2"] * 2 + [3] * 2 + ["w1 w2"] * 2
    assert asked[2][1]["role"] == "assistant" and asked[2][2] == {"role": "user", "content": "w3"}
    blocks = said.split("--- base\n")
    assert blocks[1].partition("expected")[0] == blocks[3]      # anew: the same question, the same answers
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))       # the end of the input ends it
    converse(run, (), Sampling(2))


def test_a_temperature_draws_from_the_seed_and_leaves_the_generator_alone(run):
    talk = Conversation(open_outcome(run, (), False), Sampling(12, 3.0, 1))
    state = torch.get_rng_state()
    one = talk.ask("w1")
    assert torch.equal(torch.get_rng_state(), state)
    talk.clear()
    assert talk.ask("w1") == one
    talk.clear()
    talk.sampling = Sampling(12, 3.0, 2)
    assert talk.ask("w1") != one


def test_answers_stand_side_by_side_where_a_terminal_has_room(capsys):
    from rich.console import Console

    answers = {"base": "one [red]two", "global": "three\x1b[31m\x07 four"}
    for width, beside in ((120, True), (50, False)):
        out = io.StringIO()
        conversation.show(answers, Console(file=out, width=width, force_terminal=True, color_system=None))
        said = out.getvalue()
        assert any("one [red]two" in line and "three[31m four" in line for line in said.splitlines()) == beside
        assert "\x1b[31m" not in said and "\x07" not in said and "one [red]two" in said


def test_sampling_is_refused_where_it_makes_no_sense():
    with pytest.raises(DataError, match="a temperature of at least 0"):
        flora.evaluate.answers(llama(), [[5]], flora.evaluate.Decoding(temperature=-1.0))

"""Accuracy by likelihood against plain PyTorch in fp64, choice by choice; exact match against text written out here."""
import logging

import pytest
import torch
from tiny import TARGETS, adapter, llama, tokenizer

from flora import packing, scoring
from flora.data import load_rows, normalise, tokenize_rows
from flora.data.templates import tokenize_prompts
from flora.errors import DataError
from flora.evaluate import generate, generate_clients, log_likelihoods_clients, sequence_log_likelihoods
from flora.nn import applied, lora_layers, target_shapes
from flora.scoring import Choices, Question

SHAPES = target_shapes(llama(), TARGETS)
MOODS = ["w1", "w7 w8", "w9"]


def view(rank, seed):
    return {name: adapter(rank, shape, seed + i, alpha=4.0) for i, (name, shape) in enumerate(SHAPES.items())}


VIEWS = {"a": view(4, 1), "b": None, "c": view(9, 5), "d": {}}
TEXTS = [{"prompt": f"w{i} w{2 * i} w{3 * i}", "completion": MOODS[i % 3], "label": MOODS[i % 3]} for i in range(12)]
CHOICES = scoring.label_choices(tokenizer(), TEXTS, 32)


def scores(model, row):
    """log p of each choice, alone and unpadded: log softmax of fp64 logits, summed over its labels."""
    out = []
    for choice in row.rows:
        ids, labels = torch.tensor([choice["input_ids"]]), torch.tensor(choice["labels"][1:])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        seen = labels != -100
        out.append(float(log_p[seen].gather(1, labels[seen, None]).sum()))
    return out


def best(model, row):
    found = scores(model, row)
    return found.index(max(found))


@pytest.mark.parametrize("can_pack", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_and_accuracy_are_those_of_plain_pytorch(can_pack, batch_size, monkeypatch):
    model = llama(dtype=torch.float64).train()
    if not can_pack:
        monkeypatch.setitem(packing._traits, model, packing.Traits(False, False))
    exact = [score for row in CHOICES for score in scores(model.eval(), row)]
    model.train()
    got = sequence_log_likelihoods(model, [one for row in CHOICES for one in row.rows], batch_size)
    assert got == pytest.approx(exact, rel=1e-12)
    assert model.training
    picked = [best(model.eval(), row) for row in CHOICES]
    hits = [p == row.right for p, row in zip(picked, CHOICES, strict=True)]
    assert scoring.label_accuracy(model, CHOICES, batch_size) == sum(hits) / 12
    right = [Choices(row.rows, p) for row, p in zip(CHOICES, picked, strict=True)]
    wrong = [Choices(row.rows, (p + 1) % 3) for row, p in zip(CHOICES, picked, strict=True)]
    assert scoring.label_accuracy(model, right, batch_size) == 1.0 and scoring.label_accuracy(model, wrong, batch_size) == 0.0
    assert scoring.label_accuracy(model, right[:5] + wrong[5:], batch_size) == 5 / 12
    assert len(set(picked)) > 1 and not model.training


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_every_clients_own_model_scores_its_rows_in_one_batch(batch_size):
    """The right choice of each row is what its client's model, and hardly another's, picks."""
    model = llama(dtype=torch.float64).train()
    rows, exact = {}, {}
    for k, (name, adapters) in enumerate(VIEWS.items()):
        mine = CHOICES[k:k + 6]
        with applied(model.eval(), adapters or {}):
            rows[name] = [Choices(row.rows, best(model, row)) for row in mine]
            exact[name] = [score for row in mine for score in scores(model, row)]
    rows["c"] = [*rows["c"][:2], *(Choices(row.rows, (row.right + 1) % 3) for row in rows["c"][2:])]
    model.train()
    found = scoring.label_accuracy_clients(model, VIEWS, {**rows, "d": []}, batch_size)
    assert found == {"a": 1.0, "b": 1.0, "c": 2 / 6, "d": None} and list(found) == list(VIEWS)
    flat = {name: [one for row in mine for one in row.rows] for name, mine in rows.items()}
    got = log_likelihoods_clients(model, VIEWS, flat, batch_size)
    assert all(got[name] == pytest.approx(exact[name], rel=1e-9) for name in VIEWS)
    assert model.training and not lora_layers(model)
    assert scoring.label_accuracy_clients(model, {"a": None}, {"a": rows["a"]}, batch_size)["a"] < 1.0
    assert scoring.label_accuracy_clients(model, {}, {}) == {}


def test_choices_of_many_rows_share_passes():
    model, calls = llama(), []
    scoring.label_accuracy(model, CHOICES, 9)
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    scoring.label_accuracy(model, CHOICES, 9)
    assert len(calls) == 36 / 9


def test_the_first_of_equal_choices_is_taken_and_nan_is_wrong():
    rows = [Choices([{}] * 3, right) for right in range(3)]
    assert scoring._accuracy(rows[:2], [1.0, 1.0, 0.0] * 2) == 0.5
    assert scoring._accuracy(rows[:1], [1.0, 1.0, 0.0]) == 1.0 and scoring._accuracy(rows[1:2], [1.0, 1.0, 0.0]) == 0.0
    nan = float("nan")
    assert scoring._accuracy(rows, [nan] * 9) == 0.0 and scoring._accuracy(rows[1:2], [0.0, 1.0, nan]) == 0.0
    assert scoring._accuracy(rows, [float("-inf"), -1e9, 0.0] * 3) == 1 / 3


@pytest.mark.parametrize("chat", [True, False])
def test_a_choice_is_the_row_with_another_completion(chat):
    rows = scoring.label_choices(tokenizer(), TEXTS, 32, chat)
    assert scoring.label_words(TEXTS) == sorted(MOODS) and scoring.has_labels(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        assert row.rows[row.right] == tokenize_rows(tokenizer(), [text], 32, chat)[0]
        filled = [{"prompt": text["prompt"], "completion": mood} for mood in sorted(MOODS)]
        assert list(row.rows) == tokenize_rows(tokenizer(), filled, 32, chat)
    [only] = scoring.label_choices(tokenizer(), TEXTS[:1], 32, chat, labels=["w30", "w1"])
    assert only.right == 1 and len(only.rows) == 2


def test_rows_and_choices_that_cannot_be_scored_are_refused():
    model, one = llama(), {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}
    other = {"input_ids": [3, 4, 6], "labels": [-100, -100, 6]}
    blank = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    for rows, said in [([], "got none"), ([Choices([one], 0)], "two choices"), ([Choices([one, other], 2)], "which is right"),
                       ([Choices([one, other], -1)], "which is right"), ([Choices([one, dict(one)], 0)], "same"),
                       ([Choices([one, other], 0), Choices([one, blank], 0)], "row 1.*labelled token.*choice 1")]:
        with pytest.raises(DataError, match=said):
            scoring.label_accuracy(model, rows)
    for rows in ([Choices([one, blank], 0)], [Choices([one], 0)]):
        with pytest.raises(DataError, match="row 0"):
            scoring.label_accuracy_clients(model, VIEWS, dict.fromkeys(VIEWS, rows))
    with pytest.raises(DataError, match="batch size"):
        scoring.label_accuracy(model, [Choices([one, other], 0)], 0)
    with pytest.raises(DataError, match="row 1.*label None"):
        scoring.label_words([TEXTS[0], {"prompt": "w1", "completion": "w1"}])
    with pytest.raises(DataError, match="row 0.*'w1'.*'w2'"):
        scoring.label_words([{"prompt": "w1", "completion": "w2", "label": "w1"}])
    for rows in ([], TEXTS[:1]):
        assert not scoring.has_labels(rows)
        with pytest.raises(DataError, match="two labels"):
            scoring.label_choices(tokenizer(), rows, 32)
    with pytest.raises(DataError, match="row 1: expected a label among 'w1', 'w9'; got 'w7 w8'"):
        scoring.label_choices(tokenizer(), TEXTS[:3], 32, labels=["w1", "w9"])
    assert not scoring.has_labels([*TEXTS, {"prompt": "w1", "completion": "w1"}])


def talker():
    """A model whose answers differ, in length too: a tied one repeats the last word."""
    return llama(1, torch.float64, tie_word_embeddings=False, max_position_embeddings=128, initializer_range=0.6)


def write_out(model, prompt, length):
    """The words that a model adds to a prompt, token by token, up to an end: without `generate` and without a cache."""
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following == 1:
            break
        ids.append(following)
    return tokenizer().decode(ids[len(prompt):], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_exact_match_counts_the_answers_that_are_written_word_for_word(batch_size):
    model = talker().train()
    prompts = tokenize_prompts(tokenizer(), [{"prompt": row["prompt"] + " w5" * (i % 4)} for i, row in enumerate(TEXTS[:7])], 32)
    said = [write_out(model.eval(), prompt, 4) for prompt in prompts]
    assert len(set(said)) > 2 and all(said)
    model.train()
    same = [Question(p, f"  {s.upper()}\n".replace(" ", "  ")) for p, s in zip(prompts, said, strict=True)]
    longer = [Question(p, s + " w1") for p, s in zip(prompts, said, strict=True)]
    assert scoring.exact_match(model, tokenizer(), same, 4, batch_size) == 1.0
    assert scoring.exact_match(model, tokenizer(), longer, 4, batch_size) == 0.0
    assert scoring.exact_match(model, tokenizer(), [*same[:2], *longer[2:]], 4, batch_size) == 2 / 7
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_clients_own_model_answers(batch_size):
    model, rows = talker().train(), {}
    for k, (name, adapters) in enumerate(VIEWS.items()):
        texts = [{"prompt": text["prompt"] + " w3" * (i % 3)} for i, text in enumerate(TEXTS[k:k + 4])]
        prompts = tokenize_prompts(tokenizer(), texts, 32)
        with applied(model.eval(), adapters or {}):
            rows[name] = [Question(prompt, write_out(model, prompt, 4)) for prompt in prompts]
    rows["c"][1] = Question(rows["c"][1].input_ids, "nothing of the kind")
    model.train()
    found = scoring.exact_match_clients(model, VIEWS, tokenizer(), {**rows, "d": []}, 4, batch_size)
    assert found == {"a": 1.0, "b": 1.0, "c": 0.75, "d": None} and list(found) == list(VIEWS)
    assert model.training and not lora_layers(model)
    assert scoring.exact_match(model, tokenizer(), rows["a"], 4) < 1.0          # the base does not answer as its client does


def test_one_model_answers_as_a_client_without_adapters():
    model = talker()
    prompts = [row.rows[0]["input_ids"][:3 + i % 3] for i, row in enumerate(CHOICES)]
    whole = generate_clients(model, {"a": None}, {"a": prompts}, 5)["a"]
    assert generate(model, prompts, 5, batch_size=4) == whole and generate(model, [], 5) == []
    ended = generate(model, prompts, 5, eos_id=[whole[0][0], whole[1][1]])
    assert ended[0] == [] and whole[1][1] not in ended[1] and any(ended)


def test_an_answer_ends_where_the_model_or_the_tokenizer_says():
    model, words = llama(), tokenizer()
    known = [(1, "<eos>", [1]), ([5, 3], "<eos>", [1, 3, 5]), (None, "<eos>", [1]), (7, None, [7]), (None, None, None)]
    for own, theirs, ends in known:
        model.generation_config.eos_token_id, words.eos_token = own, theirs
        assert scoring.pad_and_ends(model, words) == (0, ends)
    words.pad_token = None
    assert scoring.pad_and_ends(model, words) == (0, None)
    model.generation_config.eos_token_id = [9, 7]
    assert scoring.pad_and_ends(model, words) == (7, [7, 9])


def test_rows_and_settings_that_cannot_be_answered_are_refused():
    model, row = llama(), Question([3, 4], "w1")
    for rows, settings, said in [([], {}, "got none"), ([row], {"batch_size": 0}, "batch size"),
                                 ([row], {"max_new_tokens": 0}, "max_new_tokens"), ([Question([], "w1")], {}, "empty")]:
        with pytest.raises(DataError, match=said):
            scoring.exact_match(model, tokenizer(), rows, **settings)
        if rows:
            with pytest.raises(DataError, match=said):
                scoring.exact_match_clients(model, {"a": None}, tokenizer(), {"a": rows}, **settings)
    assert not lora_layers(model)
    for bad in ({"prompt": "w1"}, {"prompt": "w1", "answer": None}, {"prompt": "w1", "answer": " \n"}):
        assert not scoring.has_answers([bad])
        with pytest.raises(DataError, match="row 1.*answer"):
            scoring.questions(tokenizer(), [{"prompt": "w1", "answer": "w2"}, bad], 8)
    assert not scoring.has_answers([])
    with pytest.raises(DataError, match="row 0 should have a prompt"):
        scoring.questions(tokenizer(), [{"answer": "w2"}], 8)
    with pytest.raises(DataError, match="max_length"):
        tokenize_prompts(tokenizer(), TEXTS, 0)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", ["w1 w2 w3", [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"},
                                                 {"role": "user", "content": "w6"}]])
def test_a_prompt_alone_is_what_comes_before_the_completion(prompt, chat):
    [whole] = tokenize_rows(tokenizer(), [{"prompt": prompt, "completion": "w7"}], 64, chat)
    [alone] = tokenize_prompts(tokenizer(), [{"prompt": prompt}], 64, chat)
    assert alone == whole["input_ids"][:whole["labels"].count(-100)] and tokenize_prompts(tokenizer(), [], 8) == []
    assert tokenize_prompts(tokenizer(), [{"prompt": prompt}], 2, chat) == [alone[-2:]]
    [question] = scoring.questions(tokenizer(), [{"prompt": prompt, "answer": 7}], 64, chat)
    assert question == Question(alone, "7")


def test_rows_of_a_file_keep_their_answer(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q", "completion": "because, 4", "answer": "4"}\n')
    assert load_rows(path) == [{"prompt": "q", "completion": "because, 4", "answer": "4"}]
    path.write_text('{"question": "q", "answer": "4", "who": "x"}\n{"question": "q", "answer": ""}\n')
    with caplog.at_level(logging.WARNING):
        assert load_rows(path) == [{"who": "x", "answer": "4", "prompt": "q", "completion": "4"}]
    assert "left out 1 of 2" in caplog.text
    with pytest.raises(DataError, match="row 0 of the data.*choices"):
        normalise([{"question": "q", "choices": ["a", "b"], "answer": 1}])
    assert scoring.normal(" A\tb\n C ") == "a b c" and scoring.normal("STRASSE") == scoring.normal("straße")

"""Token ids: the loss is on completions only, with a chat template or without one."""

import random

import pytest
from data_helpers import ANSWER, TEMPLATE, USER, make_tokenizer

import flora.data as data
from flora.errors import DataError


def learnt(tokenizer, tokens) -> str:
    """Decode what the loss is on."""
    assert len(tokens["input_ids"]) == len(tokens["labels"])
    assert all(label in (-100, i) for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True))
    return tokenizer.decode([label for label in tokens["labels"] if label != -100])


def test_the_loss_is_on_the_completion_and_the_end_of_its_turn():
    tokenizer = make_tokenizer()
    row = {"prompt": [{"role": "system", "content": "s"}, USER], "completion": "ab cab"}
    tokens = data.tokenize(tokenizer, row, 100)
    assert learnt(tokenizer, tokens) == "ab cab<|end|>\n"
    messages = [*row["prompt"], {"role": "assistant", "content": "ab cab"}]
    assert tokens["input_ids"] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    as_turn = {"prompt": [{"role": "user", "content": "q"}], "completion": "a"}
    assert data.tokenize(tokenizer, {"prompt": "q", "completion": "a"}, 100) == data.tokenize(tokenizer, as_turn, 100)


def test_without_a_template_the_text_is_joined_and_closed():
    tokenizer = make_tokenizer(template=None)
    for row, whole, loss in (
        ({"prompt": "q", "completion": "a"}, "q\na<eos>", "a<eos>"),
        ({"prompt": "q ", "completion": "a"}, "q a<eos>", "a<eos>"),
        ({"prompt": "", "completion": "a"}, "a<eos>", "a<eos>"),
        (
            {"prompt": [USER, ANSWER, USER], "completion": "a"},
            "user: q\nassistant: a\nuser: q\nassistant: a<eos>",
            " a<eos>",
        ),
    ):
        tokens = data.tokenize(tokenizer, row, 100)
        assert tokenizer.decode(tokens["input_ids"]) == whole and learnt(tokenizer, tokens) == loss
    chatty = make_tokenizer()
    row = {"prompt": "q", "completion": "a"}
    assert learnt(chatty, data.tokenize(chatty, row, 100, chat_template=False)) == "a<eos>"


def test_a_tokenizer_that_starts_texts_with_a_token_keeps_it():
    tokenizer = make_tokenizer(template=None, bos=True)
    tokens = data.tokenize(tokenizer, {"prompt": "q", "completion": "a"}, 100)
    assert tokenizer.decode(tokens["input_ids"]) == "<bos>q\na<eos>"
    templated = make_tokenizer(template="<bos>" + TEMPLATE, bos=True)
    tokens = data.tokenize(templated, {"prompt": "q", "completion": "a"}, 100)
    assert tokens["input_ids"].count(templated.bos_token_id) == 1


def test_a_template_that_rewrites_the_prompt_falls_back_to_two_texts():
    rewriting = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think{% endif %}")
    tokenizer = make_tokenizer(rewriting)
    tokens = data.tokenize(tokenizer, {"prompt": "q", "completion": "a"}, 100)
    assert tokenizer.decode(tokens["input_ids"]) == "<|user|>q<|end|>\n<|assistant|>thinka<eos>"
    assert learnt(tokenizer, tokens) == "a<eos>"


def test_a_token_across_the_border_falls_back_to_two_texts():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokens = data.tokenize(tokenizer, {"prompt": "a", "completion": "bc"}, 100)
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == ["a", "b", "c", "<eos>"]
    assert learnt(tokenizer, tokens) == "bc<eos>"


def test_too_long_rows_lose_the_start_of_the_prompt_then_the_end_of_the_completion():
    tokenizer = make_tokenizer(template=None)
    row = {"prompt": "0123456789\n", "completion": "xyz"}
    for length, whole, loss in ((15, "0123456789\nxyz<eos>",) * 1 + ("xyz<eos>",), (6, "9\nxyz<eos>", "xyz<eos>"),
                                (5, "\nxyz<eos>", "xyz<eos>"), (3, "\nxy", "xy"), (2, "\nx", "x")):  # fmt: skip
        tokens = data.tokenize(tokenizer, row, length)
        assert tokenizer.decode(tokens["input_ids"]) == whole and learnt(tokenizer, tokens) == loss
    with pytest.raises(DataError, match="max_length"):
        data.tokenize(tokenizer, row, 1)


def test_many_rows_are_tokenised_as_one_is():
    tokenizer = make_tokenizer()
    draw = random.Random(0)
    rows = [
        {"prompt": "".join(draw.choices("ab c", k=draw.randint(0, 30))), "completion": "".join(draw.choices("ab", k=5))}
        for _ in range(50)
    ]
    assert data.tokenize_rows(tokenizer, rows, 24) == [data.tokenize(tokenizer, row, 24) for row in rows]
    assert data.tokenize_rows(tokenizer, [], 24) == []


def test_rows_that_cannot_be_written_out_are_named():
    strict = make_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    row = {"prompt": [{"role": "system", "content": "s"}], "completion": "a"}
    with pytest.raises(DataError, match="refuses row 1 with the roles system.*no system"):
        data.tokenize_rows(strict, [{"prompt": "q", "completion": "a"}, row], 10)
    with pytest.raises(DataError, match="row 0 should have a prompt.*load_rows"):
        data.tokenize(strict, {"text": "q"}, 10)

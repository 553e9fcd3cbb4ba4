"""Evaluation against transformers' own loss, row by row, and the promise that it changes nothing."""
import math
from contextlib import nullcontext

import pytest
import torch
from tiny import TARGETS, Plain, llama, token_rows
from torch import nn

import flora
from flora import losses, packing
from flora.data import batch_of
from flora.errors import DataError
from flora.evaluate import evaluate
from flora.losses import token_losses
from flora.packing import line, packable

ROWS = token_rows(11, seed=3)


def by_transformers(model, rows):
    """(sum of losses, right, labelled tokens): each row alone and unpadded through the model's own loss, in fp64 sums."""
    total, right, tokens = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            out = model(input_ids=ids, labels=labels)
            seen = labels[0, 1:] != -100
            total += float(out.loss) * int(seen.sum())
            right += int((out.logits[0, :-1].argmax(-1) == labels[0, 1:])[seen].sum())
            tokens += int(seen.sum())
    return total, right, tokens


# fp32 logits from batches of other shapes, and a sum in another order: some tens of roundings of 6e-8 each.
CLOSE = 2e-6


def test_loss_and_accuracy_are_those_of_transformers():
    model = llama()
    total, right, tokens = by_transformers(model, ROWS)
    got = evaluate(model, ROWS, batch_size=4)
    assert got["tokens"] == tokens and got["accuracy"] == right / tokens
    assert got["loss"] == pytest.approx(total / tokens, rel=CLOSE)
    assert got["perplexity"] == math.exp(got["loss"])


def test_a_prompt_that_ends_late_and_rows_without_labels_count_nothing():
    blank = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    first = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}      # nothing predicts a first token
    model = llama()
    assert evaluate(model, [*ROWS, blank, first], 1) == evaluate(model, ROWS, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_the_batch_size_does_not_matter(size):
    got, whole = evaluate(llama(), ROWS, size, pad_id=7), evaluate(llama(), ROWS, 5)
    assert got["accuracy"] == whole["accuracy"] and got["tokens"] == whole["tokens"]
    assert got["loss"] == pytest.approx(whole["loss"], rel=CLOSE)


def test_the_order_of_rows_of_other_lengths_does_not_matter():
    rows = [{"input_ids": [2 + i] * (4 + i), "labels": [2 + i] * (4 + i)} for i in range(6)]
    assert evaluate(llama(), rows, 2) == evaluate(llama(), rows[::-1], 2)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_also_after_an_error(training):
    model = llama().train(training)
    evaluate(model, ROWS, 4)
    assert model.training is training
    with pytest.raises(DataError, match="2 rows without one"):
        evaluate(model, [{"input_ids": [1, 2], "labels": [-100, -100]}] * 2)
    assert model.training is training
    with pytest.raises(DataError):
        evaluate(model, [{"input_ids": [1, 2], "labels": [1]}])
    assert model.training is training
    with pytest.raises(DataError, match="got 0 rows"):
        evaluate(model, [])


def test_published_error_one_method_evaluated_with_dropout_on():
    """A model in training mode, with adapters whose dropout is 0.9: the numbers are those of eval mode, twice the same."""
    model = flora.attach(llama(attention_dropout=0.5), 4, 8, TARGETS, dropout=0.9).train()
    with torch.no_grad():
        for layer in flora.nn.lora_layers(model).values():
            layer.B.normal_()
    state = torch.random.get_rng_state()
    first = evaluate(model, ROWS, 4)
    assert first == evaluate(model, ROWS, 4) and torch.equal(state, torch.random.get_rng_state())
    assert first == evaluate(model.eval(), ROWS, 4)


def test_a_model_without_logits_to_keep_gives_the_same():
    whole, part = evaluate(Plain(llama()), ROWS, 4), evaluate(llama(), ROWS, 4)
    assert whole["accuracy"] == part["accuracy"] and whole["loss"] == pytest.approx(part["loss"], rel=CLOSE)


def test_only_columns_with_a_label_are_computed(monkeypatch):
    model, widths, chunked = llama(), [], []
    real = losses.linear_cross_entropy
    monkeypatch.setattr(losses, "linear_cross_entropy", lambda hidden, *rest: chunked.append(len(hidden)) or real(hidden, *rest))
    rows = [{"input_ids": list(range(2, 12)), "labels": [-100] * 7 + [9, 10, 11]}] * 2
    found = evaluate(model, rows, 2)
    assert chunked == [6]                                       # the loss is taken past the head, in chunks
    model.lm_head.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))
    assert evaluate(model, rows, 2) == pytest.approx(found, rel=CLOSE) and chunked == [6]       # but not past its hooks
    monkeypatch.setitem(packing._traits, model, packing.Traits(False, False))
    evaluate(model, rows, 2)
    assert widths == [6, 3]                                     # two packed rows of three; three columns of two rows


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_taken_in_fp32_of_a_bf16_model(packed):
    model = llama(dtype=torch.bfloat16).eval()
    rows = [{"input_ids": [6, 7, 8], "labels": [6, 7, 8]}, {"input_ids": [9, 3], "labels": [-100, 3]}]
    batch = batch_of(rows, packed)
    with torch.no_grad():
        with packable(model) if packed else nullcontext(), line(model, batch.lengths) if packed else nullcontext():
            losses, right = token_losses(model, batch)
        logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float() for row in rows])
    labels = torch.tensor([7, 8, 3])
    exact = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert losses.dtype == torch.float32 and right.tolist() == (logits.argmax(-1) == labels).tolist()
    assert float((losses - exact).norm() / exact.norm()) < 1e-6         # of the same bf16 logits: rounded once


def test_a_loss_that_overflows_is_still_a_number():
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e6)
    got = evaluate(model, ROWS, 4)
    assert got["loss"] > 700 and got["perplexity"] == math.exp(700.0)

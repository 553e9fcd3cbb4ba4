"""Batches: padding, the order of an epoch, steps, and what has nothing to learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flora.data as data
from flora.errors import DataError


def token_rows(*lengths: int, unlabelled: tuple[int, ...] = ()) -> list[dict]:
    """Make rows of these lengths, named by their first token, the last token labelled."""
    rows = []
    for i, length in enumerate(lengths):
        ids = [i] + [7] * (length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * (length - 1) + [-100 if i in unlabelled else 7]})
    return rows


def names(step) -> list[list[int]]:
    """Name the rows of a step."""
    return [[row["input_ids"][0] for row in batch] for batch in step]


def test_collate_pads_on_the_right():
    batch = data.collate(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [0], "labels": [-100]}], pad_id=9
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for rows in ([], [{"input_ids": [], "labels": []}], [{"input_ids": [1], "labels": []}]):
        with pytest.raises(DataError):
            data.collate(rows)


def test_the_order_is_a_permutation_that_seed_and_key_give():
    orders = [data.epoch_order(50, *key) for key in ((0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    state = torch.random.get_rng_state()
    assert data.epoch_order(50, 0, "a") == orders[2]
    assert torch.equal(state, torch.random.get_rng_state())
    code = "from flora.data.batches import epoch_order; print(epoch_order(50, 0, 'a'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert json.loads(done.stdout) == orders[2]  # in another process, whose str hashes differ


def test_steps_keep_the_short_batch_and_the_short_step():
    steps = data.training_steps(token_rows(*[2] * 7), 2, 3, shuffle=False, seed=0)
    assert [names(next(steps)) for _ in range(3)] == [[[0, 1], [2, 3], [4, 5]], [[6]], [[0, 1], [2, 3], [4, 5]]]
    assert data.steps_per_epoch(7, 2, 3) == 2
    assert [data.steps_per_epoch(n, 2, 3) for n in (1, 6, 7, 12, 13)] == [1, 1, 2, 2, 3]


def test_shuffled_steps_see_every_row_once_an_epoch():
    rows = token_rows(*[2] * 11)
    steps = data.training_steps(rows, 2, 2, shuffle=True, seed=0, key=("a", 3))
    epochs = [[i for _ in range(3) for batch in names(next(steps)) for i in batch] for _ in range(2)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and epochs[0] != epochs[1]
    again = data.training_steps(rows, 2, 2, shuffle=True, seed=0, key=("a", 3))
    other = data.training_steps(rows, 2, 2, shuffle=True, seed=0, key=("a", 4))
    first = epochs[0][:4]
    assert sum(names(next(again)), []) == first != sum(names(next(other)), [])


def test_batches_without_labels_are_left_out():
    # The only label of row 6 is on its first token, which nothing predicts.
    rows = token_rows(2, 2, 2, 2, 2, 2, 1, unlabelled=(0, 2, 4, 5))
    steps = data.training_steps(rows, 1, 2, shuffle=False, seed=0)
    assert [names(next(steps)) for _ in range(3)] == [[[1]], [[3]], [[1]]]
    assert data.num_label_tokens(rows) == 2
    for rows in (token_rows(2, 1, unlabelled=(0,)), []):
        with pytest.raises(DataError, match="nothing to learn"):
            data.training_steps(rows, 1, 1, shuffle=True, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        data.training_steps(token_rows(2), 0, 1, shuffle=True, seed=0)


def test_a_packed_batch_is_the_padded_one_without_its_padding():
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [6], "labels": [6]},
            {"input_ids": [7, 8, 9, 2], "labels": [7, -100, 9, -100]}]
    packed, padded = data.batch_of(rows, True), data.batch_of(rows, False, pad_id=1)
    assert packed.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 9, 2]] and packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert padded.input_ids.tolist() == [[3, 4, 5, 1], [6, 1, 1, 1], [7, 8, 9, 2]]
    assert set(packed.inputs()) == {"input_ids", "position_ids"} and set(padded.inputs()) == {"input_ids", "attention_mask"}
    assert (packed.lengths, packed.spans, padded.lengths, padded.spans) == ([3, 1, 4], [3, 1, 4], [4] * 3, [4] * 3)
    for batch in (packed, padded):
        assert batch.labels.tolist() == [4, 5, 9] and batch.owners.tolist() == [0, 0, 2]
        assert batch.input_ids.flatten()[batch.positions].tolist() == [3, 4, 8]         # the tokens that predict them
    assert packed.positions.tolist() == [0, 1, 5] and padded.positions.tolist() == [0, 1, 9]


def test_a_row_may_put_several_sequences_into_a_batch():
    rows = [{"pair": ([3, 4], [5, 6, 7])}, {"pair": ([8], [9, 2])}]
    batch = data.batch_of(rows, True, sequences=lambda row: [{"input_ids": ids, "labels": ids} for ids in row["pair"]])
    assert (batch.counts, batch.lengths, batch.spans) == ([2, 2], [2, 3, 1, 2], [5, 3])
    assert batch.owners.tolist() == [0, 1, 1, 3] and batch.rows is rows
    moved = batch.map(lambda t: t + 1)
    assert moved.labels.tolist() == [5, 7, 8, 3] and moved.attention_mask is None and moved.lengths == batch.lengths

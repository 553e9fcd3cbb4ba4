"""Batches of token ids, in an order that only a seed and a key (client, round) give.

A training step is a list of batches whose gradients are accumulated, as the Trainer of transformers groups them: an
epoch's last batch may be short, and its last step may have fewer batches.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flora.errors import DataError
from flora.seeds import derive

Row = dict[str, Any]
IGNORED = -100


def collate(rows: Sequence[Row], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest and stack them.

    Returns int64 tensors (rows, length): input_ids (padded with pad_id), attention_mask (1 on tokens), labels (padded
    with -100). Raises DataError for no rows, a row without tokens, or labels of another length.
    """
    if not rows:
        raise DataError("a batch needs at least one row, none came; drop empty batches before they are collated")
    for i, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]) or not len(row["input_ids"]):
            raise DataError(
                f"row {i} of the batch has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels; expected "
                f"as many of both, and at least one: tokenise it with tokenize_rows"
            )
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.as_tensor(row["input_ids"])
        labels[i, :length] = torch.as_tensor(row["labels"])
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def epoch_order(num_rows: int, seed: int, *key: int | str) -> list[int]:
    """Return a permutation of the rows that depends on the seed and the key alone, in any process."""
    generator = torch.Generator().manual_seed(derive(seed, "order", *key))
    return torch.randperm(num_rows, generator=generator).tolist()


def training_steps(
    rows: Sequence[Row], batch_size: int, accumulation: int, shuffle: bool, seed: int, key: Sequence[int | str] = ()
) -> Iterator[list[list[Row]]]:
    """Yield optimiser steps without end, epoch after epoch: each a list of up to `accumulation` batches of rows.

    An epoch's short last batch is kept, and so is its short last step. A batch in which no token has a label is left
    out, and a step that has no other. `key` (a client's name, the round) sets the order apart from others'.
    Raises DataError when no row has a label, batch_size or accumulation is below 1.
    """
    if batch_size < 1 or accumulation < 1:
        raise DataError(f"batch_size and accumulation should be at least 1, they are {batch_size} and {accumulation}")
    learnt = [num_label_tokens([row]) > 0 for row in rows]
    if not any(learnt):
        raise DataError(
            f"none of the {len(rows)} rows has a label after its first token, so there is nothing to learn; raise "
            f"max_length or check the completions"
        )
    return _steps(rows, learnt, (batch_size, accumulation), (shuffle, seed, tuple(key)))


def _steps(
    rows: Sequence[Row], learnt: list[bool], sizes: tuple[int, int], order: tuple[bool, int, tuple[int | str, ...]]
) -> Iterator[list[list[Row]]]:
    """Generate the steps; apart from `training_steps` so that its errors come at the call, not at the first step."""
    (batch_size, accumulation), (shuffle, seed, key) = sizes, order
    epoch = 0
    while True:
        indices = epoch_order(len(rows), seed, *key, epoch) if shuffle else list(range(len(rows)))
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        for first in range(0, len(batches), accumulation):
            group = batches[first : first + accumulation]
            step = [[rows[i] for i in batch] for batch in group if any(learnt[i] for i in batch)]
            if step:
                yield step
        epoch += 1


def steps_per_epoch(num_rows: int, batch_size: int, accumulation: int) -> int:
    """Return ceil(ceil(rows / batch_size) / accumulation): the steps of an epoch in which every batch has a label."""
    batches = math.ceil(num_rows / batch_size)
    return math.ceil(batches / accumulation)


def num_label_tokens(rows: Sequence[Row]) -> int:
    """Count the tokens that a loss is taken on: labels other than -100, without the first, which nothing predicts."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def length_batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Batch rows of like length for evaluation, longest first, so that little is padding and memory peaks at once.

    Rows of one length keep their order. Raises DataError for a batch_size below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size should be at least 1, it is {batch_size}")
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]

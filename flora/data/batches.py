"""Batches of token ids, in an order that only a seed and a key (client, round) give.

A training step is a list of batches whose gradients are accumulated, as the Trainer of transformers groups them: an
epoch's last batch may be short, and its last step may have fewer batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flora.errors import DataError
from flora.seeds import derive

Row = Mapping[str, Any]
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


@dataclass(frozen=True)
class Batch:
    """Rows as a model takes them: sequences one after another in one line (packed), or one a line, padded on the right.

    rows: what it was made of; counts: sequences of each row; input_ids int64 (1, tokens) or (sequences, length);
    position_ids: packed only; attention_mask: padded only; lengths: tokens of each sequence; spans: places that each row
    takes in the model, padding included. positions, labels, owners: int64 (labelled,): the places in the flattened input that
    predict a label, the labels, and whose sequence they are in.
    """
    rows: Sequence[Row]
    counts: Sequence[int]
    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    lengths: Sequence[int]
    spans: Sequence[int]
    positions: Tensor
    labels: Tensor
    owners: Tensor

    @property
    def packed(self) -> bool:
        return self.position_ids is not None

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward takes."""
        named = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **{name: t for name, t in named.items() if t is not None}}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with `change` applied to every tensor: moved to a device, pinned."""
        tensors: dict[str, Any] = {f.name: change(t) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


def batch_of(rows: Sequence[Row], packed: bool, pad_id: int = 0, sequences: Callable[[Row], Sequence[Row]] | None = None) -> Batch:
    """A batch of rows; sequences(row): what a row puts into it (default: itself). Raises DataError as collate does."""
    parts = [list(sequences(row)) if sequences else [row] for row in rows]
    flat = [one for part in parts for one in part]
    padded = collate(flat, pad_id)
    ids, labels, mask = padded["input_ids"], padded["labels"], padded["attention_mask"].bool()
    lengths = [len(one["input_ids"]) for one in flat]
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    owners, columns = predicts.nonzero(as_tuple=True)
    wanted = labels[owners, columns + 1]
    counts = [len(part) for part in parts]
    if packed:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        position_ids = torch.arange(ids.shape[1]).expand_as(ids)[mask][None]
        where = starts[owners] + columns
    else:
        position_ids, where, lengths = None, owners * ids.shape[1] + columns, [ids.shape[1]] * len(flat)
    each = iter(lengths)
    spans = [sum(next(each) for _ in range(count)) for count in counts]
    return Batch(rows, counts, ids[mask][None] if packed else ids, None if packed else padded["attention_mask"], position_ids,
                 lengths, spans, where, wanted, owners)


def epoch_order(num_rows: int, seed: int, *key: int | str) -> list[int]:
    """Return a permutation of num_rows rows that depends on the seed and the key alone, in any process."""
    generator = torch.Generator().manual_seed(derive(seed, "order", *key))
    return torch.randperm(num_rows, generator=generator).tolist()


def training_steps(
    rows: Sequence[Row], batch_size: int, accumulation: int, shuffle: bool, seed: int, key: Sequence[int | str] = (),
    units: Callable[[Row], int] | None = None,
) -> Iterator[list[list[Row]]]:
    """Yield optimiser steps without end, epoch after epoch: each a list of up to `accumulation` batches of rows.

    An epoch's short last batch is kept, and so is its short last step. A batch in which no token has a label is left
    out, and a step that has no other. `key` (a client's name, the round) sets the order apart from others'. `units`: how
    many terms of the loss a row has (default: its labelled tokens).
    Raises DataError when no row has a label, batch_size or accumulation is below 1.
    """
    if batch_size < 1 or accumulation < 1:
        raise DataError(f"batch_size and accumulation should be at least 1, they are {batch_size} and {accumulation}")
    learnt = [(units(row) if units else num_label_tokens([row])) > 0 for row in rows]
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
    """Return ceil(ceil(num_rows / batch_size) / accumulation): the steps of an epoch in which every batch has a label."""
    batches = math.ceil(num_rows / batch_size)
    return math.ceil(batches / accumulation)


def num_label_tokens(rows: Sequence[Row]) -> int:
    """Count the tokens of the rows that a loss is taken on: labels other than -100, without the first, which nothing predicts."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])

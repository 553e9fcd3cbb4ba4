"""Held-out loss, perplexity and next-token accuracy on completions, in eval mode and without randomness.

Logits are computed only where some row of the batch has a label (`logits_to_keep` of transformers' models): with chat data
most positions are prompt, and the output embedding of a small model is a fifth of its work.
"""
import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flora.data.batches import collate, length_batches
from flora.errors import DataError


def labelled_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits that predict a label, and the labels: (positions, vocabulary) and int64 (positions,).

    batch: input_ids, attention_mask, labels (-100: none), each (sequences, tokens); position t predicts label t + 1.
    """
    labels = batch["labels"][:, 1:]
    labelled = labels != -100
    columns = labelled.any(0).nonzero().squeeze(1)
    known = inspect.signature(model.forward).parameters
    options: dict[str, object] = {"use_cache": False} if "use_cache" in known else {}
    partial = "logits_to_keep" in known
    if partial:
        options["logits_to_keep"] = columns
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options).logits
    if not partial:
        logits = logits[:, columns]
    here = labelled[:, columns]
    return logits[here], labels[:, columns][here]


def completion_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int, int]:
    """(sum of the cross entropy over labelled tokens in fp32, how many were predicted right, how many there are)."""
    logits, labels = labelled_logits(model, batch)
    right = int((logits.detach().argmax(-1) == labels).sum()) if not torch.is_grad_enabled() else 0
    return cross_entropy(logits.float(), labels, reduction="sum"), right, labels.numel()


def sequence_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of the cross entropy over each sequence's labelled tokens: fp32 (sequences,)."""
    logits, labels = labelled_logits(model, batch)
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=labels.device), counts)
    each = cross_entropy(logits.float(), labels, reduction="none")
    return torch.zeros(len(counts), device=labels.device, dtype=each.dtype).index_add(0, owner, each)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def evaluate(model: nn.Module, rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int = 8,
             pad_id: int = 0) -> dict[str, float]:
    """{"loss", "perplexity", "accuracy", "tokens"} of a model on rows: means over labelled tokens, nats, greedy next token.

    The model's mode is put back afterwards. Raises DataError where no row has a label.
    """
    was_training = model.training
    model.eval()
    total, right, tokens = 0.0, 0, 0
    try:
        for group in length_batches(rows, batch_size):
            batch = {name: t.to(device_of(model)) for name, t in collate(group, pad_id).items()}
            if not bool((batch["labels"][:, 1:] != -100).any()):
                continue
            loss, good, count = completion_loss(model, batch)
            total, right, tokens = total + float(loss), right + good, tokens + count
    finally:
        model.train(was_training)
    if tokens == 0:
        raise DataError(f"expected rows with labelled tokens to evaluate on; got {len(rows)} rows without one")
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": right / tokens, "tokens": tokens}

"""What a client minimises: a loss hook says what of a row goes into the batch, how many terms a row has, and their sum.

A client's loss is the sum over the rows of its step divided by the number of their terms; a hook gives sums, so it never sees whose
rows they are. `CausalLM` is the default; `Classification` and `Preference` are the two examples to write another one by.

Logits exist only at positions that predict a label, a chunk of them at a time, and the gradient of the hidden states is formed in
the forward pass while the chunk is there: the vocabulary sets neither the peak of memory nor a second product.
"""
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, logsigmoid

from flora.data.batches import Batch, num_label_tokens
from flora.errors import DataError
from flora.packing import is_plain, traits_of
from flora.segments import sent_to

Row = Mapping[str, Any]
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}                       # logits that exist at a time, in elements


class Loss(Protocol):
    """What a client minimises. packs: whether its sequences may lie in one line, without padding."""
    packs: bool

    def sequences(self, row: Row) -> Sequence[Row]:
        """What a row puts into the batch, as {"input_ids", "labels"}; they stay together."""

    def terms(self, row: Row) -> int:
        """Terms of the client's mean that come from this row; 0: nothing to learn from it."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of each row's terms: (rows,) in fp32 or fp64, each depending on its own row alone."""


class CausalLM:
    """-Σ log p(token | those before it) over a row's labelled tokens. Rows: {"input_ids", "labels"}, -100 where no label."""
    packs = True

    def sequences(self, row: Row) -> Sequence[Row]:
        return (row,)

    def terms(self, row: Row) -> int:
        return num_label_tokens([row])

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return sums(token_losses(model, batch)[0], batch)


class Classification:
    """Cross entropy of a sequence's class. Rows: {"input_ids", "label": int}; a model with one row of logits a sequence.

    A classification head that starts from random numbers has to train: name it among the targets ("score", "classifier") with a
    rank of at least its number of classes, which leaves nothing out.
    """
    packs = False

    def sequences(self, row: Row) -> Sequence[Row]:
        return ({"input_ids": row["input_ids"], "labels": [-100] * len(row["input_ids"])},)

    def terms(self, row: Row) -> int:
        return 1

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch.inputs(), **({"use_cache": False} if _takes(model, "use_cache") else {})).logits
        labels = sent_to(logits.device, torch.tensor([row["label"] for row in batch.rows]))
        if logits.dim() != 2 or logits.shape[0] != len(labels):
            raise DataError(f"expected logits ({len(labels)}, classes), one row a sequence; got {tuple(logits.shape)}. Use a model "
                            "for sequence classification.")
        return cross_entropy(_wide(logits), labels, reduction="none")


class Preference:
    """DPO: -log σ(β ((log p(y⁺) - ref⁺) - (log p(y⁻) - ref⁻))). Rows: {"chosen": row, "rejected": row, "reference": (ref⁺, ref⁻)}.

    chosen and rejected: rows as CausalLM's, labels on the answer; reference: their log probabilities under the base, which
    `with_reference` adds once. beta: β. arXiv 2305.18290, equation 7.
    """
    packs = True

    def __init__(self, beta: float = 0.1):
        self.beta = beta

    def sequences(self, row: Row) -> Sequence[Row]:
        return row["chosen"], row["rejected"]

    def terms(self, row: Row) -> int:
        return int(num_label_tokens([row["chosen"]]) > 0 and num_label_tokens([row["rejected"]]) > 0)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        log_p = -sequence_sums(token_losses(model, batch)[0], batch).view(-1, 2)
        if any("reference" not in row for row in batch.rows):
            raise DataError("expected rows with a \"reference\"; got rows without. Make them by flora.evaluate.with_reference.")
        reference = sent_to(log_p.device, torch.tensor([row["reference"] for row in batch.rows], dtype=log_p.dtype))
        gain = log_p - reference
        return -logsigmoid(self.beta * (gain[:, 0] - gain[:, 1]))


def sequence_sums(losses: Tensor, batch: Batch) -> Tensor:
    """(labelled,) summed over each sequence: (sequences,)."""
    return losses.new_zeros(len(batch.lengths)).index_add(0, batch.owners, losses)


def sums(losses: Tensor, batch: Batch) -> Tensor:
    """(labelled,) summed over each row: (rows,)."""
    each = sequence_sums(losses, batch)
    if all(count == 1 for count in batch.counts):
        return each
    owner = sent_to(each.device, torch.repeat_interleave(torch.tensor(batch.counts)))
    return each.new_zeros(len(batch.counts)).index_add(0, owner, each)


def _wide(logits: Tensor) -> Tensor:
    """In fp32, or fp64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(the cross entropy of every labelled token, whether the likeliest token was right), both (labelled,); fp32, fp64 of an fp64
    model. The second only without gradients. Around a packed batch the caller holds packing.line."""
    head = model.get_output_embeddings() if traits_of(model).head else None
    if head is not None and is_plain(head) and not (torch.is_grad_enabled() and head.weight.requires_grad):
        options = {"use_cache": False} if _takes(model.base_model, "use_cache") else {}
        hidden = model.base_model(**batch.inputs(), **options)[0]
        return linear_cross_entropy(hidden.flatten(0, 1)[batch.positions], head.weight, batch.labels, head.bias)
    logits = labelled_logits(model, batch)
    right = None if torch.is_grad_enabled() else logits.argmax(-1) == batch.labels
    return cross_entropy(_wide(logits), batch.labels, reduction="none"), right


def labelled_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict a label (labelled, vocabulary), of any causal LM: computed at the columns where some row has one."""
    width = batch.input_ids.shape[1]
    columns, where = torch.unique(batch.positions % width, return_inverse=True)
    options: dict[str, object] = {"use_cache": False} if _takes(model, "use_cache") else {}
    partial = _takes(model, "logits_to_keep")
    if partial:
        options["logits_to_keep"] = columns
    logits = model(**batch.inputs(), **options).logits
    return (logits if partial else logits[:, columns])[batch.positions // width, where]


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None,
                         chunk: int | None = None) -> tuple[Tensor, Tensor | None]:
    """-log softmax(hidden Wᵀ + bias)[label] of every row, (n,) in fp32 or fp64, and without gradients whether it is the largest.

    hidden (n, d); weight (vocabulary, d), bias: frozen; labels int64 (n,). chunk: rows of logits at a time (default: 2^24 elements
    on a CPU). A row meets no other, so the gradient of each is formed with its logits, for a loss of weight one, and scaled in the
    backward pass. Differentiable once, in hidden.
    """
    chunk = chunk or max(1, CHUNK.get(hidden.device.type, 1 << 24) // weight.shape[0])
    chunk = -(-hidden.shape[0] // max(1, -(-hidden.shape[0] // chunk))) or 1                    # as many chunks, of like size
    losses, right = _LinearCrossEntropy.apply(hidden, weight, labels, bias, chunk, torch.is_grad_enabled())
    return losses, None if torch.is_grad_enabled() else right


class _LinearCrossEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, chunk, training):
        n = hidden.shape[0]
        losses = hidden.new_empty(n, dtype=torch.promote_types(hidden.dtype, torch.float32))
        right = torch.empty(0 if training else n, dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, n, chunk):
            rows = slice(start, min(n, start + chunk))
            logits, own = _wide(linear(hidden[rows], weight, bias)), labels[rows, None]
            if not training:
                right[rows] = logits.argmax(1) == labels[rows]
            top = logits.amax(1, keepdim=True)
            picked = logits.gather(1, own) - top
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            losses[rows] = (total.log() - picked)[:, 0]
            if gradient is not None:                            # (softmax - one) W, the division left to the last
                logits.scatter_add_(1, own, -total)
                gradient[rows] = (logits.to(weight.dtype) @ weight) / total
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _):
        [gradient] = ctx.saved_tensors
        return (gradient * dlosses[:, None]).to(gradient.dtype), None, None, None, None, None

"""How often a model is right: by the likelihood of the choices it has, or by the answer it gives.

Likelihood: the score of a choice is the sum of the log-likelihoods of its tokens given the prompt, not divided by their number, so
choices should be words of like length, or letters. The model's answer is the choice of the highest score, the first of equals. A
row counts where that is the right one; a row with a NaN among its scores does not.

Exact match: the model continues the prompt greedily, and a row counts where what it wrote equals the row's answer after both were
normalised: white space at the ends dropped, within made one blank, letter case folded. Nothing is searched for in a longer text.

Choices of all rows, and rows of all clients, go through the same passes. batch_size, pad_id, views: as in evaluate.py.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from flora.adapter import Adapters
from flora.data.batches import num_label_tokens
from flora.data.templates import tokenize_prompts, tokenize_rows
from flora.errors import DataError
from flora.evaluate import generate, generate_clients, log_likelihoods_clients, sequence_log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Choices:
    """One row to answer. rows: {"input_ids", "labels"} of each choice, labels on the choice's tokens; right: which it is."""
    rows: Sequence[Row]
    right: int


@dataclass(frozen=True)
class Question:
    """A prompt to answer. input_ids: up to where the answer starts; answer: the text that is right."""
    input_ids: Sequence[int]
    answer: str


def label_accuracy(model: nn.Module, rows: Sequence[Choices], batch_size: int = 8, pad_id: int = 0) -> float:
    """The part of the rows whose right choice has the highest likelihood. batch_size: choices a pass.

    Raises DataError for no rows, fewer than two choices, choices that cannot be told apart, or one without a labelled token.
    """
    if not rows:
        raise DataError("expected rows to measure the accuracy of; got none. Hold some rows out.")
    return _accuracy(rows, sequence_log_likelihoods(model, _flat(rows), batch_size, pad_id))


def label_accuracy_clients(model: nn.Module, views: Mapping[str, Adapters | None], rows: Mapping[str, Sequence[Choices]],
                           batch_size: int = 8, pad_id: int = 0) -> dict[str, float | None]:
    """What `label_accuracy` gives for every client's own model, by name: the base with its adapters (None: the base) on its rows.

    None for a client without rows.
    """
    scores = log_likelihoods_clients(model, views, {name: _flat(rows[name]) for name in views}, batch_size, pad_id)
    return {name: _accuracy(rows[name], found) if rows[name] else None for name, found in scores.items()}


def has_labels(rows: Sequence[Row]) -> bool:
    """Whether rows can be scored by labels: each has a label, which is its completion, and there are two or more of them."""
    return all(row.get("label") is not None and row["label"] == row.get("completion") for row in rows) and \
        len({row["label"] for row in rows}) > 1


def label_words(rows: Sequence[Row]) -> list[str]:
    """The distinct labels of rows, sorted: what each row's choices are.

    Take them of all rows: one client may not hold every label. Raises DataError where `has_labels` is False, saying why.
    """
    for number, row in enumerate(rows):
        if row.get("label") is None or row["label"] != row.get("completion"):
            raise DataError(f"row {number}: expected a label that is its completion; got the label {row.get('label')!r} and the "
                            f"completion {row.get('completion')!r}. Add a column label, or do not evaluate labels.")
    words = sorted({row["label"] for row in rows})
    if len(words) < 2:
        raise DataError(f"expected rows of at least two labels to choose from; got {words} in {len(rows)} rows. Give more rows, or "
                        "do not evaluate labels.")
    return words


def label_choices(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], max_length: int, chat_template: bool = True,
                  labels: Sequence[str] | None = None) -> list[Choices]:
    """Rows of text (prompt, completion, label) with each label in the place of the completion, as token ids.

    labels: the choices; None: `label_words` of these rows. Each choice is cut to max_length as `tokenize_rows` cuts. Raises
    DataError for a row whose label is not among the choices.
    """
    words = label_words(rows) if labels is None else list(labels)
    for number, row in enumerate(rows):
        if row.get("label") not in words:
            raise DataError(f"row {number}: expected a label among {', '.join(map(repr, words))}; got {row.get('label')!r}. Mend "
                            "it, or add it to the labels.")
    filled = [{**row, "completion": word} for row in rows for word in words]
    tokenized = iter(tokenize_rows(tokenizer, filled, max_length, chat_template))
    return [Choices(list(islice(tokenized, len(words))), words.index(row["label"])) for row in rows]


def exact_match(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Question], max_new_tokens: int = 32,
                batch_size: int = 8) -> float:
    """The part of the rows that the model, as it is, answers word for word, by the rule of this module.

    An answer ends at the model's or the tokenizer's end, or after max_new_tokens, which longer answers cannot match. Raises
    DataError for no rows.
    """
    if not rows:
        raise DataError("expected rows to measure the exact match of; got none. Hold some rows out.")
    pad_id, ends = pad_and_ends(model, tokenizer)
    answers = generate(model, [row.input_ids for row in rows], max_new_tokens, pad_id, ends, batch_size)
    return _matches(tokenizer, rows, answers)


def exact_match_clients(model: nn.Module, views: Mapping[str, Adapters | None], tokenizer: "PreTrainedTokenizerBase",
                        rows: Mapping[str, Sequence[Question]], max_new_tokens: int = 32,
                        batch_size: int = 8) -> dict[str, float | None]:
    """What `exact_match` gives for every client's own model, by name; batch_size prompts at a time, whosever they are.

    None for a client without rows.
    """
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1; got {batch_size}. Set it to the prompts that one pass may hold.")
    pad_id, ends = pad_and_ends(model, tokenizer)
    flat = sorted(((name, i) for name in views for i in range(len(rows[name]))), key=lambda at: -len(rows[at[0]][at[1]].input_ids))
    found: dict[tuple[str, int], list[int]] = {}
    for start in range(0, len(flat), batch_size):
        batch = flat[start:start + batch_size]
        mine = {name: [at for at in batch if at[0] == name] for name in views if any(at[0] == name for at in batch)}
        prompts = {name: [rows[name][i].input_ids for _, i in ats] for name, ats in mine.items()}
        answers = generate_clients(model, {name: views[name] for name in mine}, prompts, max_new_tokens, pad_id, ends)
        for name, ats in mine.items():
            found.update(zip(ats, answers[name], strict=True))
    return {name: _matches(tokenizer, rows[name], [found[name, i] for i in range(len(rows[name]))]) if rows[name] else None
            for name in views}


def has_answers(rows: Sequence[Row]) -> bool:
    """Whether rows can be scored by exact match: each has an answer that is not blank."""
    return bool(rows) and all(row.get("answer") is not None and normal(str(row["answer"])) for row in rows)


def questions(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], max_length: int, chat_template: bool = True,
              ) -> list[Question]:
    """Rows of text (prompt, answer) as token ids; prompts are cut at their start to max_length. Raises DataError for no answer."""
    for number, row in enumerate(rows):
        if not has_answers([row]):
            raise DataError(f"row {number}: expected a column answer with the text that is right; got {row.get('answer')!r} among "
                            f"the columns {', '.join(row)}. Add it, or do not evaluate answers.")
    prompts = tokenize_prompts(tokenizer, [dict(row) for row in rows], max_length, chat_template)
    return [Question(prompt, str(row["answer"])) for prompt, row in zip(prompts, rows, strict=True)]


def normal(text: str) -> str:
    """A text as exact match compares it: white space at the ends dropped, within made one blank, letter case folded."""
    return " ".join(text.split()).casefold()


def pad_and_ends(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, list[int] | None]:
    """(the token to pad with, the tokens that end an answer: the model's and the tokenizer's; None: neither has one)."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, Sequence) else [own]), tokenizer.eos_token_id} - {None}
    pads = (tokenizer.pad_token_id, *sorted(ends), 0)
    return next(token for token in pads if token is not None), sorted(ends) or None


def _matches(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Question], answers: Sequence[Sequence[int]]) -> float:
    texts = tokenizer.batch_decode([list(answer) for answer in answers], skip_special_tokens=True)
    return sum(normal(text) == normal(row.answer) for text, row in zip(texts, rows, strict=True)) / len(rows)


def _accuracy(rows: Sequence[Choices], scores: Sequence[float]) -> float:
    """scores: of the choices of all rows, in order."""
    each, right = iter(scores), 0
    for row in rows:
        own = list(islice(each, len(row.rows)))
        best = own[row.right]
        right += all(score < best for score in own[:row.right]) and all(score <= best for score in own[row.right:])
    return right / len(rows)


def _flat(rows: Sequence[Choices]) -> list[Row]:
    """The choices of all rows, each checked: there is one to be right, and the model can tell them apart."""
    for number, row in enumerate(rows):
        if len(row.rows) < 2 or not 0 <= row.right < len(row.rows):
            raise DataError(f"row {number}: expected two choices or more, and which is right, from 0; got {len(row.rows)} and "
                            f"{row.right}. Make them by label_choices.")
        if len({(tuple(one["input_ids"]), tuple(one["labels"])) for one in row.rows}) < len(row.rows):
            raise DataError(f"row {number}: expected choices of different tokens; got two that are the same. Raise max_length, or "
                            "check that the tokenizer knows their words.")
        bare = [i for i, one in enumerate(row.rows) if not num_label_tokens([one])]
        if bare:
            raise DataError(f"row {number}: expected a labelled token in every choice; got none in choice {bare[0]}, whose "
                            "likelihood would be that of nothing. Raise max_length, or start prompts with a token.")
    return [one for row in rows for one in row.rows]

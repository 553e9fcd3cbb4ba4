"""What a run evaluates beside loss and next-token accuracy (the key `evaluate`): labels, answers, lm_eval:FOLDER, mt_bench:FILE."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flora.adapter import Adapters
from flora.config import RunConfig
from flora.mmlu import lm_eval_mmlu
from flora.mt_bench import MTQuestion, answer_questions, read_questions, write_answers
from flora.scoring import (
    Choices,
    Question,
    exact_match,
    exact_match_clients,
    has_answers,
    has_labels,
    label_accuracy,
    label_accuracy_clients,
    label_choices,
    label_words,
    questions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LABELS = 20                                                # of which `auto` takes one as a choice among words
LONGEST_ANSWER = 1024                                           # tokens: MT-bench's own
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """choices, asked: rows to score by likelihood and by exact match, by client, the server's under ""; none: not scored so."""
    tokenizer: "PreTrainedTokenizerBase"
    batch_size: int = 8
    pad_id: int = 0
    choices: Mapping[str, Sequence[Choices]] = field(default_factory=dict)
    asked: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    lm_eval: Sequence[str] = ()
    mt_bench: Mapping[str, Sequence[MTQuestion]] = field(default_factory=dict)

    def of_clients(self, model: nn.Module, views: Mapping[str, Adapters | None]) -> dict[str, dict[str, float | None]]:
        """label_accuracy and exact_match of every client's own model on its own rows; None where it has none."""
        found: dict[str, dict[str, float | None]] = {name: {} for name in views}
        if self.choices:
            for name, value in label_accuracy_clients(model, views, self.choices, self.batch_size, self.pad_id).items():
                found[name]["label_accuracy"] = value
        if self.asked:
            for name, value in exact_match_clients(model, views, self.tokenizer, self.asked, batch_size=self.batch_size).items():
                found[name]["exact_match"] = value
        return found

    def of_server(self, model: nn.Module) -> dict[str, float]:
        """label_accuracy, exact_match and lm_eval of a model on the server's rows."""
        found = {}
        if self.choices:
            found["label_accuracy"] = label_accuracy(model, self.choices[""], self.batch_size, self.pad_id)
        if self.asked:
            found["exact_match"] = exact_match(model, self.tokenizer, self.asked[""], batch_size=self.batch_size)
        accuracies = [lm_eval_mmlu(model, self.tokenizer, folder, self.batch_size)["acc"] for folder in self.lm_eval]
        return found | ({"lm_eval": sum(accuracies) / len(accuracies)} if accuracies else {})

    def write_answers(self, model: nn.Module, folder: Path, model_id: str) -> list[Path]:
        """The model's answers to every mt_bench file, in folder, a file each; their paths."""
        written, places = [], getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * LONGEST_ANSWER
        longest = min(LONGEST_ANSWER, places // 2)              # the question needs room too
        for name, asked in self.mt_bench.items():
            path = folder / f"{Path(name).stem}-answers.jsonl"
            write_answers(path, answer_questions(model, self.tokenizer, asked, model_id, longest, self.batch_size))
            written.append(path)
        return written


def scores_of(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", rows: Mapping[str, Sequence[Row]]) -> Scores:
    """What the key `evaluate` asks for, ready to score. rows: held out, untokenised, by client, the server's under "".

    auto: labels where every row's label is its completion, of at most MOST_LABELS; answers where every row has one. Raises
    DataError for rows that lack what is asked for by name, or a file that cannot be read.
    """
    everybody = [row for some in rows.values() for row in some]
    if config.evaluate == "auto":
        labels = has_labels(everybody) and len(label_words(everybody)) <= MOST_LABELS
        wanted = ["labels"] if labels else ["answers"] if has_answers(everybody) else []
    else:
        wanted = list(config.evaluate)
    choices, asked = {}, {}
    if "labels" in wanted:
        words = label_words(everybody)
        choices = {name: label_choices(tokenizer, some, config.max_length, config.chat_template, words)
                   for name, some in rows.items()}
    if "answers" in wanted:
        asked = {name: questions(tokenizer, some, config.max_length, config.chat_template) for name, some in rows.items()}
    files = {kind: [entry.partition(":")[2] for entry in wanted if entry.startswith(kind)] for kind in ("lm_eval:", "mt_bench:")}
    return Scores(tokenizer, config.per_device_eval_batch_size, tokenizer.pad_token_id or 0, choices, asked, files["lm_eval:"],
                  {name: read_questions(name) for name in files["mt_bench:"]})

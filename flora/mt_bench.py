"""Answers to MT-bench's questions, in the files of FastChat, which a judge reads elsewhere (arXiv 2306.05685).

The questions: a line of {"question_id", "category", "turns": [first, second]} each. The model answers greedily, with its
tokenizer's chat template; the second question comes after the first and the model's own answer to it. The same model gives the same
file, byte for byte: an answer's id is a digest of what it is, and its time is 0.
"""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flora.data.templates import tokenize_prompts
from flora.errors import ConfigError, DataError
from flora.evaluate import generate
from flora.files import write_text
from flora.scoring import pad_and_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MTQuestion:
    """A line of question.jsonl. turns: the two questions, in order."""
    question_id: int | str
    category: str
    turns: tuple[str, str]


def read_questions(path: str | Path) -> list[MTQuestion]:
    """The questions of a question.jsonl, in its order; blank lines are left out. Raises DataError, naming the file and the line."""
    path = Path(path).expanduser()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: expected MT-bench's question.jsonl; it cannot be read ({error.strerror}). Give the path of that "
                        "file.") from error
    found: dict[int | str, MTQuestion] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            question = _question(line, f"{path}, line {number}")
            if question.question_id in found:
                raise DataError(f"{path}, line {number}: expected every question_id once; got {question.question_id!r} again. "
                                "Delete one of the two lines.")
            found[question.question_id] = question
    if not found:
        raise DataError(f"{path}: expected a line of JSON for every question; got an empty file. Give MT-bench's question.jsonl.")
    return list(found.values())


def _question(line: bytes, where: str) -> MTQuestion:
    shape = '{"question_id": number, "category": text, "turns": [text, text]}'
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: expected {shape}; got no JSON in UTF-8 ({error}). Mend or delete that line.") from error
    turns = record.get("turns") if isinstance(record, dict) else None
    fits = (isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) and turn.strip() for turn in turns)
            and isinstance(record.get("question_id"), (int, str)) and isinstance(record.get("category"), str))
    if not fits:
        raise DataError(f"{where}: expected {shape}; got {str(record)[:120]}. Mend or delete that line.")
    return MTQuestion(record["question_id"], record["category"], (turns[0], turns[1]))


def answer_questions(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", questions: Sequence[MTQuestion], model_id: str,
                     max_new_tokens: int = 1024, batch_size: int = 8) -> list[dict[str, Any]]:
    """A record of FastChat for each question, in order, signed model_id; batch_size questions at a time. A tokenizer without a chat
    template gets "user: ..." lines.

    A prompt that leaves no room for max_new_tokens in the model's positions loses its start. Raises ConfigError where none does.
    """
    room = _room(model, max_new_tokens)
    pad_id, ends = pad_and_ends(model, tokenizer)
    talks = [[{"role": "user", "content": question.turns[0]}] for question in questions]
    for turn in range(2):
        prompts = tokenize_prompts(tokenizer, [{"prompt": talk} for talk in talks], room)
        answers = generate(model, prompts, max_new_tokens, pad_id, ends, batch_size)
        for talk, question, text in zip(talks, questions, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            talk.append({"role": "assistant", "content": text.strip()})
            if turn == 0:
                talk.append({"role": "user", "content": question.turns[1]})
    return [_record(question, model_id, [talk[1]["content"], talk[3]["content"]])
            for question, talk in zip(questions, talks, strict=True)]


def _room(model: nn.Module, max_new_tokens: int) -> int:
    """How many tokens a prompt may have."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if places <= max_new_tokens:
        raise ConfigError(f"expected max_new_tokens below the model's {places} positions, which hold the question as well; got "
                          f"{max_new_tokens}. Lower it.")
    return places - max_new_tokens


def _record(question: MTQuestion, model_id: str, turns: Sequence[str]) -> dict[str, Any]:
    what = json.dumps([question.question_id, model_id, turns], ensure_ascii=False)
    digest = hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()[:22]
    return {"question_id": question.question_id, "answer_id": digest, "model_id": model_id,
            "choices": [{"index": 0, "turns": list(turns)}], "tstamp": 0.0}


def write_answers(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes records one a line, whole or not at all: FastChat's data/mt_bench/model_answer/MODEL_ID.jsonl."""
    write_text(Path(path), "".join(json.dumps(record) + "\n" for record in records))

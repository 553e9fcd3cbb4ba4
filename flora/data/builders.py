"""Rows from the two data sets that are fetched by name; what is odd in each file is dealt with here."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flora.errors import DataError

Row = dict[str, Any]
CONTEXT_TURNS = 3
QUESTION = "Classify the sentiment of this tweet as negative, neutral or positive.\n\nTweet: "


def chitchat(path: Path, limit: int | None = None) -> list[Row]:
    """Build one row for each turn that answers another: what was said before it, and what its sender said.

    Seen from the sender, who is the assistant; the others are the user. The prompt is the last turn before it, or the
    last three, so that it starts and ends with the user (some chat templates insist on it). Messages of one turn are
    lines of one text. Columns: prompt, completion, sender, conversation.
    """
    rows: list[Row] = []
    for conversation, record in _json(path).items():
        turns = _turns(record["messages"])
        for i in range(1, len(turns)):
            context = turns[max(0, i - CONTEXT_TURNS) : i]
            rows.append(_answer(turns[i], context, conversation))
        if limit is not None and len(rows) >= limit:
            return rows[:limit]
    return rows


def _answer(turn: tuple[str, str], context: list[tuple[str, str]], conversation: str) -> Row:
    """Build the row of one turn; `context` and `turn` are (sender, text)."""
    sender, completion = turn
    prompt = [{"role": "assistant" if who == sender else "user", "content": text} for who, text in context]
    while prompt[0]["role"] == "assistant":
        prompt.pop(0)
    return {"prompt": prompt, "completion": completion, "sender": sender, "conversation": conversation}


def _turns(record: list[list[Row]]) -> list[tuple[str, str]]:
    """Flatten to (sender, text), one a turn: texts that are blank go, and turns that then touch are one turn."""
    turns: list[tuple[str, str]] = []
    for message in (message for turn in record for message in turn):
        text = message["text"].strip()
        if text and turns and turns[-1][0] == message["sender"]:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{text}")
        elif text:
            turns.append((message["sender"], text))
    return turns


def tweets(path: Path, limit: int | None = None) -> list[Row]:
    """Build a classification row for each tweet. Columns: prompt, completion, label (both the word), confidence
    (of the people who labelled it; None where the file has none).

    The file mixes several broken encodings, so bytes that are not UTF-8 are left out, and it is sorted by label, so
    the rows are shuffled once and for all: the first thousand hold every label.
    """
    text = path.read_bytes().decode("utf-8", errors="ignore")
    rows: list[Row] = []
    for record in csv.DictReader(io.StringIO(text, newline="")):
        words, label = " ".join((record.get("text") or "").split()), record.get("sentiment")
        if words and label:
            confidence = float(record["confidence"]) if record.get("confidence") else None
            rows.append({"prompt": QUESTION + words, "completion": label, "label": label, "confidence": confidence})
    if not rows:
        raise DataError(f"{path} holds no tweets: expected the columns sentiment, confidence and text; fetch it again")
    # The key of a sort, and not shuffle(): Python keeps random() the same between versions, and only that.
    keys = random.Random(0)
    order = sorted((keys.random(), i) for i in range(len(rows)))
    return [rows[i] for _, i in order[:limit]]


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read
    except ValueError as error:
        raise DataError(
            f"{path} is not the JSON file that was fetched ({error}); delete its folder, run again"
        ) from error


BUILDERS: dict[str, Callable[[Path, int | None], list[Row]]] = {"chitchat": chitchat, "tweets": tweets}

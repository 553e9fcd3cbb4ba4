"""Rows of one form from files of many: `{"prompt": text or messages, "completion": text, ...the other columns}`.

Five common forms are told apart by their columns, not by their file's name: prompt and completion (texts, or lists of
messages), messages, conversations (ShareGPT), instruction and output (Alpaca), question and answer. A column `answer`
is kept, also where it is what is learnt: an evaluation by exact match reads it.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.data.builders import BUILDERS
from flora.data.fetch import SOURCES, fetch
from flora.errors import DataError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

Row = dict[str, Any]
_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def load_rows(source: str | Path, limit: int | None = None) -> list[Row]:
    """Load rows of one form from a fetched name, a file, a folder of files, or a hub's data set.

    `limit` keeps the first rows. Files are .json, .jsonl, .parquet or .csv; a folder holds one kind of them. A row
    without a completion is left out and counted in a warning. Raises DataError (missing, unreadable, empty, columns
    that fit no form) and FetchError.
    """
    text, path = str(source), Path(source).expanduser()
    if limit is not None and limit < 1:
        raise DataError(f"limit should be at least 1, it is {limit}; leave it out to read every row")
    if text in BUILDERS:
        folder = fetch(text)
        return BUILDERS[text](folder / SOURCES[text].files[0], limit)
    if text in SOURCES:
        raise DataError(f"{text!r} is a model, not a data set; data sets that can be fetched: {', '.join(BUILDERS)}")
    rows = _read(_files(path), limit) if path.exists() else _read_hub(text, limit)
    if not rows:
        raise DataError(f"{text} holds no rows; expected at least one, with the columns of {_accepted()}")
    return normalise(rows, text)


def normalise(rows: Iterable[Row], name: str = "the data") -> list[Row]:
    """Bring rows to one form by their columns; `name` is what error messages call the data.

    Columns that the form does not use are kept. Raises DataError for columns of no known form, a row that breaks its
    form, and when no row has a completion.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{name} holds no rows; expected at least one, with the columns of {_accepted()}")
    count, kept = len(rows), []
    for number, row in enumerate(rows):
        used, convert = _form(row, name, number)
        try:
            prompt, completion = convert(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"row {number} of {name} is not well formed: {error}; expected the columns of {_accepted()}"
            ) from error
        if completion.strip() and (prompt or isinstance(prompt, str)):
            others = {key: value for key, value in row.items() if key not in used or key == "answer"}
            kept.append({**others, "prompt": prompt, "completion": completion})
    if len(kept) < count:
        log.warning("%s: left out %d of %d rows, which have no prompt or no completion", name, count - len(kept), count)
    if not kept:
        raise DataError(f"none of the {count} rows of {name} has a completion; check the columns and the roles")
    return kept


def _from_pair(row: Row) -> tuple[str | list[Row], str]:
    """Convert prompt and completion: texts, or lists of messages of which the last is what is learnt."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):
        before = _text_or_messages(prompt)
        turns = [{"role": "user", "content": before}] if isinstance(before, str) else before
        return _from_turns(turns + _messages(completion, "role", "content"))
    return _text_or_messages(prompt), _text(completion)


def _from_messages(row: Row) -> tuple[str | list[Row], str]:
    """Convert a conversation: the last assistant message is the completion, what comes before it the prompt."""
    return _from_turns(_messages(row["messages"] or [], "role", "content"))


def _from_sharegpt(row: Row) -> tuple[str | list[Row], str]:
    """Convert from/value turns; some files of this kind spell them role and content."""
    turns = row["conversations"] or []
    keys = ("from", "value") if turns and "from" in turns[0] else ("role", "content")
    return _from_turns(_messages(turns, *keys))


def _from_alpaca(row: Row) -> tuple[str | list[Row], str]:
    """Convert instruction, optional input, and output."""
    context = _text(row.get("input"))
    return "\n\n".join(part for part in (_text(row["instruction"]), context) if part), _text(row["output"])


def _from_question(row: Row) -> tuple[str | list[Row], str]:
    """Convert a question and its answer; with choices the answer is the number of one, which is not what to learn."""
    if "choices" in row:
        raise ValueError("it has choices, so its answer is the number of one; write the answer out, or leave choices out")
    return _text(row["question"]), _text(row["answer"])


_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Row], tuple[str | list[Row], str]]], ...] = (
    (("prompt", "completion"), (), _from_pair),
    (("messages",), (), _from_messages),
    (("conversations",), (), _from_sharegpt),
    (("instruction", "output"), ("input",), _from_alpaca),
    (("question", "answer"), (), _from_question),
)


def _form(row: Row, name: str, number: int) -> tuple[tuple[str, ...], Callable[[Row], tuple[str | list[Row], str]]]:
    """Find the first form whose columns the row has; return the columns it uses and its converter."""
    for needed, optional, convert in _FORMS:
        if all(column in row for column in needed):
            return needed + optional, convert
    raise DataError(
        f"row {number} of {name} has the columns {', '.join(map(repr, row)) or 'none'}; expected the columns of "
        f"{_accepted()}. Rename its columns to one of these"
    )


def _accepted() -> str:
    """List the accepted sets of columns."""
    return "; or ".join(
        ", ".join(needed) + (f" (and {optional[0]})" if optional else "") for needed, optional, _ in _FORMS
    )


def _from_turns(turns: list[Row]) -> tuple[list[Row], str]:
    """Cut a conversation before its last assistant message."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    return (turns[:last], turns[last]["content"]) if last >= 0 else (turns, "")


def _messages(turns: list[Row], role: str, content: str) -> list[Row]:
    """Read a list of turns as messages with known roles, refusing what is not one."""
    found = []
    for turn in turns:
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise ValueError(f"expected messages with {role!r} and {content!r}, found {str(turn)[:80]!r}")
        if turn[role] not in _SHAREGPT:
            raise ValueError(f"unknown role {turn[role]!r}; expected one of {', '.join(_SHAREGPT)}")
        found.append({"role": _SHAREGPT[turn[role]], "content": _text(turn[content])})
    return found


def _text_or_messages(value: object) -> str | list[Row]:
    """Read a prompt."""
    return _messages(value, "role", "content") if isinstance(value, list) else _text(value)


def _text(value: object) -> str:
    """Read a text; a number or a date that a file reader guessed from a text becomes text again."""
    if value is None:
        return ""
    if isinstance(value, (list, dict, bytes)):
        raise ValueError(f"expected a text, found {type(value).__name__} {str(value)[:80]!r}")
    return str(value)


def _files(path: Path) -> list[Path]:
    """List the readable files that `path` names: itself, or those of one kind in its folder."""
    found = sorted(file for file in path.iterdir() if file.suffix in _LOADERS) if path.is_dir() else [path]
    kinds = {_LOADERS.get(file.suffix) for file in found}
    if len(kinds) != 1 or None in kinds:
        what = ", ".join(sorted(file.name for file in found)[:6]) or "no such file"
        raise DataError(f"cannot read {path}: expected {' '.join(_LOADERS)} files of one kind, found {what}")
    for file in found:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; expected rows with the columns of {_accepted()}")
    return found


def _read(files: list[Path], limit: int | None) -> list[Row]:
    """Read files with `datasets`, leaving nothing behind in its cache."""
    import datasets

    loader = _LOADERS[files[0].suffix]
    with tempfile.TemporaryDirectory() as cache, _quiet():
        try:
            names = [str(file.resolve()) for file in files]
            table = datasets.load_dataset(loader, data_files=names, split="train", cache_dir=cache, keep_in_memory=True)
            return _first_rows(table, limit)
        except Exception as error:  # pyarrow, pandas and datasets each raise their own
            raise DataError(_unreadable(files, error)) from error


def _read_hub(name: str, limit: int | None) -> list[Row]:
    """Read the train split of a hub's data set; a path that does not exist ends here too."""
    import datasets

    if Path(name).suffix in _LOADERS or name.startswith(("/", ".", "~")):
        raise DataError(f"no file or folder at {name}; give an existing path, or one of: {', '.join(BUILDERS)}")
    with _quiet():
        try:
            return _first_rows(datasets.load_dataset(name, split="train"), limit)
        except Exception as error:
            raise DataError(
                f"{name!r} is no file or folder here, none of {', '.join(BUILDERS)}, and a hub did not give it "
                f"({_first_line(error)}); check the spelling and the network"
            ) from error


def _first_rows(table: "datasets.Dataset", limit: int | None) -> list[Row]:
    """Return the first rows of a table."""
    rows: list[Row] = table.select(range(min(limit or len(table), len(table)))).to_list()
    return rows


def _unreadable(files: list[Path], error: Exception) -> str:
    """Say which file is broken and, for lines of JSON, which line: the readers name neither."""
    for file in files:
        bad = _bad_line(file) if file.suffix == ".jsonl" else None
        if bad:
            return f"{file}, line {bad[0]}: not a JSON object ({bad[1]}); mend or delete that line"
    cause = error.__cause__ or error
    return (
        f"cannot read {', '.join(map(str, files[:3]))} as {files[0].suffix[1:]} ({_first_line(cause)}); expected UTF-8 "
        f"and rows with the same columns and types throughout"
    )


def _bad_line(file: Path) -> tuple[int, str] | None:
    """Find the first line that is not a JSON object in UTF-8: its number, from 1, and what is wrong."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return number, "some other JSON value"
            except ValueError as error:
                return number, str(error)
    return None


def _first_line(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from drawing bars and from logging the error that is raised as well; put its settings back."""
    import datasets

    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()

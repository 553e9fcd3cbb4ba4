"""`flora eval`: what a run's model, a client's, its base, or any model or adapter is worth on rows: the numbers of a run."""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flora.data import load_rows, tokenize_rows
from flora.engines.prepare import prepare
from flora.engines.scores import Scores, scores_of
from flora.errors import ConfigError, DataError, RunError
from flora.evaluate import evaluate
from flora.files import write_text
from flora.outcome import Outcome, open_outcome

COLUMNS = {"loss": "loss", "perplexity": "perplexity", "accuracy": "next token", "label_accuracy": "labels",
           "exact_match": "answers", "lm_eval": "lm-eval"}


@dataclass(frozen=True)
class Data:
    """Rows to evaluate on: as token ids, and what beside loss they are scored by, under ""."""
    rows: Sequence[Mapping[str, Any]]
    scores: Scores


def eval_model(target: str | Path, data: str | Path | None = None, clients: Sequence[str] = (), *, limit: int | None = None,
               with_base: bool = False, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row for every model and data set: {"model", "data", "rows", "tokens", "loss", "perplexity", "accuracy"} and, where rows
    have labels or answers or it is asked for, "label_accuracy", "exact_match", "lm_eval": means in nats and shares, as in a run.

    target: a finished run, a model's folder or fetched name, a PEFT folder. data: a file, a folder of files, a fetched name, of
    which the first `limit` rows count; None: of a run, the rows that the server held out, and those of each client named. clients:
    whose own models of the last round; a beginning of a name is enough. with_base: also the model that training began with.
    settings: keys of a config over the run's own, such as device, dtype, evaluate, per_device_eval_batch_size. Raises RunError,
    DataError, ConfigError.
    """
    outcome = open_outcome(target, clients, with_base, settings)
    clients = list(outcome.views)[len(outcome.views) - len(clients):]       # in full
    if data is not None:
        sets = {str(data): _rows_of(outcome, load_rows(data, limit))}
    elif limit is not None:
        raise ConfigError("expected --data with a number of rows: of a run's own held-out rows all count. Give both, or neither.")
    elif outcome.run is None:
        raise DataError(f"expected rows to evaluate {target} on; got none. Give a file, a folder, or a fetched name: --data.")
    else:
        sets = _held_out(outcome, clients)
    found = []
    for name in outcome.views:
        with outcome.seen(name) as model:
            for what, own in sets.items():
                if name in clients and data is None and what != name:
                    continue                                    # a client's own model is measured on its own rows
                pad, size = outcome.tokenizer.pad_token_id or 0, outcome.config.per_device_eval_batch_size
                found.append({"model": name, "data": what, "rows": len(own.rows), **evaluate(model, own.rows, size, pad),
                              **own.scores.of_server(model)})
    return found


def _rows_of(outcome: Outcome, rows: list[dict[str, Any]]) -> Data:
    config, tokenizer = outcome.config, outcome.tokenizer
    return Data(tokenize_rows(tokenizer, rows, config.max_length, config.chat_template), scores_of(config, tokenizer, {"": rows}))


def _held_out(outcome: Outcome, clients: Sequence[str]) -> dict[str, Data]:
    """The rows that the run held out: "server", and those of the clients, as the run itself dealt them."""
    job = prepare(outcome.config, lambda line: None, outcome.model)
    out = {"server": Data(job.server_rows, job.scores)}
    for name in clients:
        if name not in job.eval_rows:
            raise RunError(f"expected a client that has rows of its own; got {name!r}, which answered for a group. Give --data.")
        if not job.eval_rows[name]:
            raise RunError(f"expected held-out rows of {name}; the run has none (eval_rows_per_client). Give --data.")
        scored = [what for what in ("choices", "asked") if getattr(job.scores, what)]
        own: dict[str, Any] = {what: {"": getattr(job.scores, what)[name]} for what in scored}
        out[name] = Data(job.eval_rows[name], replace(job.scores, **own))
    return out


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table."""
    table = Table(box=SIMPLE, caption="loss in nats a token, of labelled tokens; shares of tokens or rows that are right",
                  caption_justify="left")
    for name in ("model", "data"):
        table.add_column(name, overflow="fold")
    shown = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    for title in ("rows", *shown.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        numbers = (_number(key, row.get(key)) for key in shown)
        table.add_row(escape(row["model"]), escape(row["data"]), str(row["rows"]), *numbers)
    Console().print(table)


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if key == "loss" else f"{value:.2f}" if key == "perplexity" else f"{value:.1%}"


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the rows as JSON. Raises ConfigError where the file cannot be written."""
    try:
        write_text(path, json.dumps(list(rows), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: expected a file that can be written; got {path} ({error.strerror})") from error

"""What a run says: rows in metrics.jsonl as they come, its display while it works, and one table at the end."""
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from flora.checkpoint import disk_errors
from flora.client import LocalClient
from flora.display import Board, Display, Shown, duration
from flora.errors import RunError
from flora.files import append, write_text
from flora.group import Group, leaves
from flora.tracking import Tracked

SCORES = {"eval_label_accuracy": "labels", "eval_exact_match": "answers", "eval_lm_eval": "lm-eval"}


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a line that a crash cut short, or that is no row, is left out."""
    rows = []
    path = Path(folder) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) and "kind" in row else []
    return rows


def client_named(folder: str | Path, word: str) -> str:
    """The client of a run that this word names: by its name, or by a beginning that no other name has; else the word itself. Raises
    RunError for a beginning of several names."""
    names: set[str] = {row["client"] for row in read_metrics(folder) if row["kind"] == "client"}
    found = sorted(name for name in names if name.startswith(word))
    if word in names or not found:
        return word
    if len(found) > 1:
        raise RunError(f"expected a client of {folder}, or a beginning of one name; {word!r} begins {len(found)}: "
                       f"{', '.join(found[:5])}. Give more of it.")
    return found[0]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


class Report:
    """Rows of one run, and what it shows; a context manager while the run works.

    folder: the run folder; first: the round it starts or goes on at: rows of later rounds, which a crash left, are dropped;
    display: what shows it (None: nothing).
    """

    def __init__(self, folder: Path, first: int = 0, display: Display | None = None):
        self.folder, self.path, self.first = folder, folder / "metrics.jsonl", first
        self.display = display or Display(Board(0), quiet=True)
        self.tracked = Tracked([], self.say)
        self.rows = [row for row in read_metrics(folder) if first and row.get("round", row.get("rounds_done", 1) - 1) < first]
        with disk_errors(folder):
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._rounds = Counter(row["client"] for row in self.rows if row["kind"] == "client")
        self.board.losses += [row["eval_loss"] for row in self.rows if "eval_loss" in row]

    @property
    def board(self) -> Board:
        return self.display.board

    def __enter__(self) -> "Report":
        self.display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.display.__exit__(kind, error, trace)
        self.tracked.close(failed=kind is not None)

    def say(self, text: str) -> None:
        """One line for the person who waits."""
        self.display.say(text)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row: after a crash or Ctrl-C the file is readable up to the last row; after a loss of power, up to the last
        round, whose server's row waits for the disk."""
        self.rows.append(dict(row))
        with disk_errors(self.folder):
            append(self.path, json.dumps(row) + "\n", lasting=row["kind"] == "server")
        self.tracked.add(row)
        if "eval_loss" in row:
            self.board.losses.append(row["eval_loss"])

    def start(self, what: str, count: int, unit: str = "held-out rows") -> None:
        """Begins a phase of the round: so many clients to train, or rows to evaluate."""
        self.display.start(what, count, unit)

    def advance(self, count: int = 1) -> None:
        self.board.count += count

    def train(self, number: int, parties: Sequence[LocalClient | Group]) -> None:
        """Begins the training of a round. A client in a group has done the rounds that its group has."""
        clients = [Shown(client.name, client.rank, self._rounds.get(client.name, self._rounds[party.name]))
                   for party in parties for client in leaves([party])]
        self.start(f"round {number}: train", len(clients), "clients")
        self.board.train(clients)

    def on_step(self, client: str, step: int, steps: int, loss: float, speed: float = 0.0, together: float = 0.0) -> None:
        """Shows a client's step. speed: its tokens a second; together: of all clients."""
        self.board.step(client, step, steps, loss, speed)
        self.board.speed = together

    def leave_out(self, number: int, client: str, reason: str, state: str) -> None:
        """A client that a round goes without. state: failed, late or refused."""
        self.add({"kind": "failure", "round": number, "client": client, "reason": reason})
        self.board.leave_out(client, state, reason)
        self.say(f"round {number}: {client} is left out: {reason}")

    def round_done(self, number: int, row: Mapping[str, Any]) -> None:
        """Counts a round and says what came of it. row: the server's."""
        self._rounds.update(self.board.round_done())
        left = self.board.left()
        parts = [f"held-out loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:.1%}"] if "eval_loss" in row else ["done"]
        parts += [f"{sum(row['seconds'].values()):.1f} s"] + ([f"about {duration(left)} left"] if left is not None else [])
        self.say(f"round {number}: " + ", ".join(parts))

    def table(self) -> list[Table]:
        """The run at a glance: the global model by round, and every client before and after."""
        return summary(self.rows)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Two rich tables of a run's rows: the server by round; the clients by rank, before their first and after their last round."""
    server = Table(title="global model, held-out completions", title_justify="left", box=SIMPLE)
    extra = sorted({name for row in rows if row["kind"] == "server" for name in row if name in SCORES})
    timed = ["simulated s"] if any("simulated_total" in row for row in rows) else []
    private = ["ε"] if any("epsilon" in row for row in rows) else []
    for name in ("rounds", "loss", "perplexity", "accuracy", *(SCORES[e] for e in extra), "MB up", "MB down", "tok/s", "seconds",
                 *timed, *private):
        server.add_column(name, justify="right")
    for row in (row for row in rows if row["kind"] == "server"):
        if "eval_loss" in row:
            quality = [_number(row["eval_loss"]), f"{row['eval_perplexity']:.2f}", f"{row['eval_accuracy']:.1%}",
                       *(f"{row[name]:.1%}" if name in row else "–" for name in extra)]
        else:
            quality = ["–"] * (3 + len(extra))
        server.add_row(str(row["rounds_done"]), *quality, _megabytes(row["bytes_up"]), _megabytes(row["bytes_down"]),
                       f"{rate:.0f}" if (rate := row.get("tokens_per_second")) else "–",
                       f"{sum(row['seconds'].values()):.1f}", *(f"{row.get('simulated_total', 0.0):.1f}" for _ in timed),
                       *(f"{row.get('epsilon', 0.0):.2f}" for _ in private))
    clients = Table(title="clients, loss on their own held-out completions before and after", title_justify="left", box=SIMPLE)
    clients.add_column("client", max_width=10, no_wrap=True)
    for name in ("rank", "rows", "before", "after", "MB up", "MB down", "s"):
        clients.add_column(name, justify="right")
    names = list(dict.fromkeys(row["client"] for row in rows if row["kind"] == "client"))
    for name in names:
        mine = [row for row in rows if row["kind"] == "client" and row["client"] == name]
        first, last = ([row[key] for row in mine if row.get(key) is not None] for key in ("eval_loss_before", "eval_loss_after"))
        clients.add_row(name, str(mine[0]["rank"]), str(mine[0]["num_examples"]), _number(first[0] if first else None),
                        _number(last[-1] if last else None), _megabytes(sum(r["bytes_up"] for r in mine)),
                        _megabytes(sum(r["bytes_down"] for r in mine)),
                        f"{sum(sum(r['seconds'].values()) for r in mine):.1f}")
    failed = [row for row in rows if row["kind"] == "failure"]
    if failed:
        clients.caption = "left out: " + "; ".join(f"{row['client']} in round {row['round']}" for row in failed)
    return [server, clients]

"""What a run shows while it works: on a terminal the clients of the round, a row each; in a log one line a phase and round."""
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

TRAINING, WAITING, DONE = "training", "waiting", "done"
OUT = ("failed", "late", "refused")
ORDER = (TRAINING, WAITING, *OUT, DONE)                         # who is shown first, where not all find room
STYLES = {TRAINING: "bold", WAITING: "dim", DONE: "green", "failed": "red", "late": "yellow", "refused": "red"}
# Columns as they stand; widths in characters; a narrow terminal goes without the last ones of KEEP.
WIDTHS = {"client": 16, "rank": 5, "step": 9, "loss": 8, "tokens/s": 8, "rounds": 6, "state": 8}
KEEP = ("client", "state", "step", "loss", "rank", "tokens/s", "rounds")
GAP = 2
RECENT = 5                                                      # rounds whose losses are shown, and whose seconds are averaged


def clean(text: str) -> str:
    """Text without control characters: a client's name comes from data, and could move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def duration(seconds: float) -> str:
    """0:07, 12:30, 3:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass
class Shown:
    """A client of the round. speed: tokens a second; rounds: that it has done; reason: why it is left out."""
    name: str
    rank: int
    rounds: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    speed: float = 0.0
    state: str = WAITING
    reason: str = ""


class Board:
    """What is known of a run at this moment; rich renders it for the terminal as it is then, so a resized one is right at once.

    rounds: of the run; done: how many are done. The thread that draws reads while the run writes: it takes copies of lists.
    """

    def __init__(self, rounds: int, done: int = 0):
        self.rounds, self.done, self.began = rounds, done, time.monotonic()
        self.clients: dict[str, Shown] = {}
        self.losses: list[float] = []
        self.phase, self.count, self.of, self.speed = "", 0, 0, 0.0
        self.training = False
        self._took: list[float] = []
        self._round_began: float | None = None
        self._training_began = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def start(self, phase: str, of: int) -> None:
        self.phase, self.count, self.of, self.speed, self.training = phase, 0, of, 0.0, False
        self._round_began = self._round_began or time.monotonic()

    def train(self, clients: Iterable[Shown]) -> None:
        """The phase that has begun is the training of these clients, who wait for their first step."""
        self.clients, self._training_began = {client.name: client for client in clients}, time.monotonic()
        self.training = True

    def step(self, client: str, step: int, steps: int, loss: float, speed: float) -> None:
        shown = self.clients.setdefault(client, Shown(client, 0))
        was = shown.state
        shown.step, shown.steps, shown.loss, shown.speed = step, steps, loss, speed
        shown.state = DONE if step == steps else TRAINING
        self.count += (shown.state == DONE) - (was == DONE)

    def leave_out(self, client: str, state: str, reason: str) -> None:
        shown = self.clients.setdefault(client, Shown(client, 0))
        shown.state, shown.reason = state, reason

    def round_done(self) -> list[str]:
        """Counts the round; the names of the clients that have done it."""
        self.done += 1
        self._took.append(time.monotonic() - (self._round_began or time.monotonic()))
        self._round_began = None
        return [client.name for client in self.clients.values() if client.state == DONE]

    def share(self) -> float:
        """How much of the phase is done, from 0 to 1: of a training by steps, those of clients that wait taken as the others'."""
        clients = list(self.clients.values())
        known = [client for client in clients if client.steps]
        if not self.training or not known:
            return min(1.0, self.count / max(1, self.of))
        return sum(client.step for client in known) * len(known) / (len(clients) * sum(client.steps for client in known))

    def left(self) -> float | None:
        """About how many seconds the run still takes: by the last rounds, in the first one by its steps; None: not known yet."""
        todo, now = self.rounds - self.done, time.monotonic()
        if todo <= 0:
            return None
        if self._took:
            mean = sum(self._took[-RECENT:]) / len(self._took[-RECENT:])
            return mean * todo - min(mean, now - (self._round_began or now))
        share, spent = self.share(), now - self._training_began
        return spent / share * todo - spent if self.training and share else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.max_height or console.size.height
        lines = self._head(width)
        yield from lines
        room = height - len(lines) - 2                          # the heads of the columns; a line of the terminal's own
        clients = list(self.clients.values())
        if not clients or room < 1:
            return
        hidden: Sequence[Shown] = ()
        if len(clients) > room:
            clients = sorted(clients, key=lambda client: ORDER.index(client.state))
            clients, hidden = clients[:max(0, room - 1)], clients[max(0, room - 1):]
        if clients:
            yield from self._table(clients, width)
        if hidden:
            states = Counter(client.state for client in hidden)
            rest = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
            yield _line(f"and {len(hidden)} more: {rest}", "dim")

    def _head(self, width: int) -> list[Table | Text]:
        """The phase and how far it is; the run, its time and its last losses."""
        words = [self.phase, f"{self.count}/{self.of}"] + ([f"{self.speed:,.0f} tokens/s"] if self.speed else [])
        taken = sum(map(len, words)) + GAP * len(words)
        first: Table | Text = _line("  ".join(words), "bold")
        if self.of and width - taken >= 20:
            first = Table.grid(padding=(0, GAP, 0, 0))
            bar = ProgressBar(1.0, self.share(), width=min(30, width - taken - GAP))
            first.add_row(Text(self.phase, "bold"), bar, *words[1:])
        left = self.left()
        second = f"{self.done} of {self.rounds} rounds, {duration(self.elapsed())}"
        second += f", about {duration(left)} left" if left is not None else ""
        out: list[Table | Text] = [first, _line(second)]
        return out + ([_line("held-out loss " + " > ".join(f"{x:.3f}" for x in self.losses[-RECENT:]))] if self.losses else [])

    def _table(self, clients: Sequence[Shown], width: int) -> Iterator[Text]:
        """The clients under the heads of as many columns as there is room for."""
        columns, taken = ["client"], 8
        for name in KEEP[1:]:
            taken += GAP + WIDTHS[name]
            if taken > width:
                break
            columns.append(name)
        widths = {name: WIDTHS[name] for name in WIDTHS if name in columns}
        others = sum(widths.values()) + GAP * (len(columns) - 1) - widths["client"]
        longest = max(6, *(cell_len(clean(client.name)) for client in clients))
        widths["client"] = max(1, min(longest, WIDTHS["client"], width - others))
        if "state" in columns:                                  # the last one; the reason has what is left
            widths["state"] += max(0, width - others - widths["client"])
        yield _row({name: name for name in widths}, widths, "dim")
        for client in clients:
            yield _row({"client": client.name, "rank": str(client.rank or ""),
                        "step": f"{client.step}/{client.steps}" if client.steps else "",
                        "loss": "" if client.loss is None else f"{client.loss:.3f}",
                        "tokens/s": f"{client.speed:,.0f}" if client.speed else "", "rounds": str(client.rounds),
                        "state": client.state + (f": {client.reason}" if client.reason else "")}, widths, STYLES[client.state])


def _row(cells: Mapping[str, str], widths: Mapping[str, int], style: str) -> Text:
    """A row of the table, its state styled. Text of fixed widths takes a sixth of the time of rich's Table."""
    parts = []
    for name, width in widths.items():
        cell = clean(cells[name])
        if cell_len(cell) > width:
            cell = set_cell_size(cell, width - 1) + "…"
        pad = " " * (width - cell_len(cell))
        parts.append(cell + pad if name in ("client", "state") else pad + cell)
    text = Text((" " * GAP).join(parts).rstrip(), no_wrap=True, overflow="crop")
    text.stylize(style, 0 if style == "dim" or "state" not in widths else len((" " * GAP).join(parts[:-1])))
    return text


def _line(text: str, style: str = "") -> Text:
    return Text(clean(text), style, no_wrap=True, overflow="ellipsis")


class Display:
    """A board on a terminal, lines with the time since the start elsewhere, nothing where quiet; a context manager.

    console: where (standard error); live: draw the board (where the output is a terminal that can move its cursor; a colour that
    is forced on a file, as CI systems do, makes it no terminal).
    """

    def __init__(self, board: Board, quiet: bool = False, console: Console | None = None, live: bool | None = None):
        self.board, self.quiet, self.console = board, quiet, console or Console(stderr=True)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and self.console.file.isatty() \
            if live is None else live
        self._live = Live(board, console=self.console, refresh_per_second=4, transient=True) if self.live and not quiet else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line for the person who waits; kept above the board."""
        if not self.quiet:
            when = "" if self.live else f"{duration(self.board.elapsed()):>7}  "
            self.console.print(Text(when + clean(text)), soft_wrap=True)

    def start(self, phase: str, count: int, unit: str) -> None:
        """Begins a phase: so many clients to train, or rows to evaluate."""
        self.board.start(phase, count)
        if not self.live:
            self.say(f"{phase}, {count} {unit}")


@contextlib.contextmanager
def errors_only(quiet: bool) -> Iterator[None]:
    """While a quiet run goes on, its warnings are not shown; they are rows of metrics.jsonl."""
    log = logging.getLogger("flora")
    level = log.level
    try:
        if quiet:
            log.setLevel(logging.ERROR)
        yield
    finally:
        log.setLevel(level)

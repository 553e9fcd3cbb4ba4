"""What a run shows: every client on a terminal of any size, plain lines in a log, next to nothing where quiet."""
import io
import re
import time
from dataclasses import replace

import pytest
from rich.console import Console
from test_engines import settings
from tiny import TARGETS, llama, python, token_rows

import flora
from flora import display
from flora.cohort import Cohort
from flora.display import Board, Display, Shown, clean, duration
from flora.engines.hierarchy import Hierarchy
from flora.report import Report
from flora.server import Server

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def drawn(board, width, height):
    """What a board looks like on a terminal of so many columns and lines."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None, record=True)
    lines = console.render_lines(board, console.options.update(max_width=width, height=None), pad=False)
    return ["".join(part.text for part in line) for line in lines]


def board_of(count, training=(), done=()):
    board = Board(10, 2)
    board.losses += [4.5, 4.25]
    board.start("round 2: train", count)
    board.train([Shown(f"client-{k:04}", 2 ** (k % 5), 2) for k in range(count)])
    for k in (*training, *done):
        board.step(f"client-{k:04}", 8 if k in done else 3, 8, 2.0 + k, 100.0 + k)
    board.speed = 1234.5
    return board


def test_every_client_is_a_row_with_all_that_is_known_of_it():
    board = board_of(4, training=[0], done=[1])
    board.leave_out("client-0003", "failed", "its loss is nan")
    lines = drawn(board, 100, 24)
    assert lines[0].startswith("round 2: train") and "1/4" in lines[0] and "1,234 tokens/s" in lines[0]
    assert "2 of 10 rounds" in lines[1] and "left" in lines[1] and lines[2].strip() == "held-out loss 4.500 > 4.250"
    assert lines[3].split() == ["client", "rank", "step", "loss", "tokens/s", "rounds", "state"]
    assert [line.split() for line in lines[4:]] == [
        ["client-0000", "1", "3/8", "2.000", "100", "2", "training"], ["client-0001", "2", "8/8", "3.000", "101", "2", "done"],
        ["client-0002", "4", "2", "waiting"], ["client-0003", "8", "2", "failed:", "its", "loss", "is", "nan"]]


@pytest.mark.parametrize("height", [3, 4, 5, 6, 10, 24, 50])
@pytest.mark.parametrize("count", [1, 20, 1000])
def test_as_many_clients_as_the_terminal_holds_and_a_count_of_the_rest(count, height):
    training, done = range(count // 2, count // 2 + 3), range(count // 4)
    lines = drawn(board_of(count, training if count > 1 else [0], done), 80, height)
    assert len(lines) < height or height == 3
    shown = [line.split()[0] for line in lines if line.startswith("client-")]
    rest = [int(line.split()[1]) for line in lines if line.startswith("and ")]
    assert len(shown) + sum(rest) == count or height < 6
    if count > height > 6:
        assert shown[:3] == [f"client-{k:04}" for k in training] and not set(shown) & {f"client-{k:04}" for k in done}
        [said] = [line for line in lines if line.startswith("and ")]
        assert f"{len(done)} done" in said and said.strip().endswith("done")


@pytest.mark.parametrize("width", [1, 5, 12, 20, 27, 33, 40, 50, 60, 80, 200])
def test_a_narrow_terminal_goes_without_columns_and_never_wraps(width):
    board = board_of(5, training=[0, 1])
    board.leave_out("client-0002", "refused", "expected a finite number; got another " * 5)
    lines = drawn(board, width, 24)
    assert max(map(len, lines)) <= width and len(lines) == 9
    heads = lines[3].split()
    if width >= 20:
        assert heads == [name for name in display.WIDTHS if name in display.KEEP[:len(heads)]] and "state" in heads
    assert (len(heads) == 7) == (width >= 66) and lines[5].startswith("client"[:min(6, width - 1)])


def test_a_name_cannot_move_the_cursor():
    board = Board(1)
    board.start("round 0: train", 1)
    board.train([Shown("名前" * 20, 4)])                           # two columns a sign
    assert max(map(len, drawn(board, 80, 24))) <= 80 and "名前名前名前名 …" in drawn(board, 80, 24)[-1]
    board.train([Shown("a\x1b[2Jb\nc[red]", 4)])
    board.leave_out("a\x1b[2Jb\nc[red]", "failed", "x\ry")
    row = drawn(board, 80, 24)[-1]
    assert "a?[2Jb?c[red]" in row and "failed: x?y" in row and clean("tab\tbell\a×") == "tab?bell?×"
    out = io.StringIO()
    Display(Board(1), console=Console(file=out), live=False).say("a\x1b[2J [bold]b")
    assert out.getvalue() == "   0:00  a?[2J [bold]b\n"


def test_the_time_that_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    board = Board(3)
    assert board.left() is None
    board.start("round 0: train", 2)
    board.train([Shown("a", 1), Shown("b", 1)])
    assert board.left() is None and board.share() == 0.0
    now[0] += 10
    board.step("a", 2, 4, 1.0, 1.0)                             # a quarter of the round in 10 s; b is taken for as long
    assert board.share() == 0.25 and board.left() == pytest.approx(3 * 40 - 10)
    now[0] += 20
    board.round_done()
    assert board.left() == pytest.approx(2 * 30) and board.done == 1
    board.start("round 1: before", 8)
    now[0] += 12
    board.count += 2
    assert board.left() == pytest.approx(2 * 30 - 12) and board.share() == 0.25
    now[0] += 100                                               # longer than expected: one more round at least
    assert board.left() == pytest.approx(30)
    board.round_done()
    board.round_done()
    assert board.left() is None
    assert [duration(s) for s in (0.4, 59.6, 754, 11045)] == ["0:00", "1:00", "12:34", "3:04:05"]


def test_inner_rounds_train_a_client_again_and_count_it_once():
    board = board_of(2)
    for step in (1, 2, 1, 2):
        board.step("client-0000", step, 2, 1.0, 1.0)
        assert board.count == step - 1
    assert board.round_done() == ["client-0000"]


def test_a_terminal_shows_the_board_and_keeps_the_lines():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90, height=20, color_system=None)
    with Display(board_of(3, training=[1]), console=console, live=True) as shown:
        shown.say("a line")
        shown._live.refresh()
    said = out.getvalue()
    assert "client-0001" in said and "\x1b[?25l" in said and said.rstrip().endswith("\x1b[2K") and "a line\n" in said
    assert said.count("\x1b[?25h") == 1                         # the cursor is back


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "xterm-256color"}])
def test_no_color_is_respected(monkeypatch, environment):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90, height=20)
    console.print(board_of(2, done=[0]))
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", out.getvalue())) == ("NO_COLOR" not in environment)


@pytest.mark.parametrize(("environment", "terminal"), [({}, True), ({"FORCE_COLOR": "1"}, False), ({"TERM": "dumb"}, True)])
def test_only_a_terminal_that_moves_its_cursor_gets_a_board(monkeypatch, environment, terminal):
    class File(io.StringIO):
        def isatty(self):
            return terminal

    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Display(Board(1), console=Console(file=File())).live == (environment == {})


def test_a_log_has_plain_lines_one_a_phase_and_round(place):
    """As CI and nohup run it: no terminal, though FORCE_COLOR asks for colours."""
    (place / "run.py").write_text(f"import flora; flora.run({settings(place, 'log', quiet=False)!r})")
    done = python(str(place / "run.py"))
    assert done.returncode == 0 and not CONTROL.search(done.stderr) and not CONTROL.search(done.stdout)
    lines = done.stderr.splitlines()
    assert all(re.match(r" +\d+:\d\d  \S", line) for line in lines), done.stderr
    words = [line.split("  ")[-1] for line in lines]
    assert "clients of rank" in words[2] and "strategy flora, 2 rounds" in words[2] and "MB up and down" in words[2]
    for number in (0, 1):
        assert [word for word in words if word.startswith(f"round {number}: ")][:2] == [
            f"round {number}: before, 12 held-out rows", f"round {number}: train, 4 clients"]
        assert sum(word.startswith(f"round {number}: held-out loss") for word in words) == 1
    assert len(words) == 3 + 2 * 4
    folder = place / "log"
    assert f"every row in {folder}/metrics.jsonl" in done.stdout and f"tensorboard --logdir {folder}/tensorboard" in done.stdout
    assert f"next: flora chat {folder}   flora report {folder}   flora verify {folder}   flora export {folder} --out" in done.stdout


def test_quiet_is_errors_and_the_final_path(place, monkeypatch, capfd):
    """A client that fails is a row of metrics.jsonl; what stops the run is an error."""
    fit = Cohort.fit

    def sick(self, *rest, **options):
        updates = fit(self, *rest, **options)
        self._fail(updates[0].client, ValueError("it fell"))
        return updates[1:]

    monkeypatch.setattr(Cohort, "fit", sick)
    folder = flora.run(settings(place, "quiet", num_rounds=1, quiet=True))
    assert capfd.readouterr() == (f"{folder}\n", "")
    flora.run(settings(place, "loud", num_rounds=1, quiet=False))
    said = capfd.readouterr()
    assert "is left out: it fell" in said.err and "global model" in said.out
    flora.compare(settings(place, "quiet-compare", num_rounds=1, quiet=True), ["flora"], [0])
    assert capfd.readouterr() == (f"{place / 'quiet-compare'}\n", "")


@pytest.mark.parametrize(("how", "state"), [("refused", "refused"), ("failed", "failed"), ("late", "late"), ("next", "late"),
                                            ("vanished", "failed")])
def test_who_is_left_out_is_shown_with_the_reason(place, monkeypatch, how, state):
    seen, leave_out = [], Report.leave_out

    def look(self, *said):
        leave_out(self, *said)
        shown = self.board.clients[said[1]]
        seen.append((shown.state, shown.reason))

    monkeypatch.setattr(Report, "leave_out", look)
    changes = {}
    if how == "refused":
        take = Server.take
        monkeypatch.setattr(Server, "take", lambda self, arrived: take(self, {n: u for n, u in arrived.items() if n != "client-1"})
                            | {"client-1": "why"})
    elif how == "failed":
        fit = Cohort.fit

        def sick(self, *rest, **options):
            updates = fit(self, *rest, **options)
            self.failures = {"client-1": "why"}
            return [update for update in updates if update.client != "client-1"]

        monkeypatch.setattr(Cohort, "fit", sick)
    else:
        clock = Hierarchy.clock

        def lose(self, *given):
            due, found = clock(self, *given)
            return [party for party in due if party.name != "client-1" or how == "next"], replace(
                found, lost={"client-1": "late" if how == "next" else how})

        monkeypatch.setattr(Hierarchy, "clock", lose)
        changes = {"late": "next" if how == "next" else "drop", "round_deadline": 1e6, "fleet": [
            {"name": "phone", "count": 4, "seconds_per_layer_step": 0.01, "memory_mb": 4000, "up_mbps": 1, "down_mbps": 4}]}
    flora.run(settings(place, f"out-{how}", num_rounds=1, **changes))
    reason = {"refused": "why", "failed": "why"}.get(how, "its device")
    assert [found[0] for found in seen] == [state] and seen[0][1].startswith(reason)


def test_rounds_that_a_client_has_done_survive_a_resume(tmp_path):
    with Report(tmp_path) as report:
        for number in (0, 1):
            for name in ("a", "b")[:2 - number]:
                report.add({"kind": "client", "round": number, "client": name})
    board = Board(3, 2)
    report = Report(tmp_path, 2, Display(board, quiet=True))
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    report.train(2, [flora.LocalClient("a", [row]), flora.LocalClient("b", [row]), flora.LocalClient("c", [row])])
    assert [client.rounds for client in board.clients.values()] == [2, 1, 0]
    report.on_step("c", 1, 1, 0.5)
    report.round_done(2, {"seconds": {}})
    report.train(3, [flora.LocalClient("c", [row])])
    assert [client.rounds for client in board.clients.values()] == [1]


def test_the_speed_of_a_client_is_its_own():
    seen = {}
    clients = [flora.LocalClient("short", token_rows(4, longest=5), 2), flora.LocalClient("long", token_rows(4, longest=30), 2)]
    cohort = Cohort(llama(), clients, flora.TrainConfig(max_steps=3, per_device_train_batch_size=2), TARGETS)
    updates = cohort.fit(flora.Broadcast(), on_step=lambda name, *_: seen.update({name: cohort.speed(name)}))
    assert {name: tokens for name, (tokens, _) in cohort._own.items()} == {u.client: u.metrics["tokens"] for u in updates}
    assert all(speed > 0 for speed in seen.values()) and len(seen) == 2 and cohort.speed("nobody") == 0.0

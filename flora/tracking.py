"""Where a run's rows go beside metrics.jsonl (report_to): TensorBoard's event files, and Weights & Biases where it is asked for.

Both show what `scalars` makes of a row, by rounds done. Neither can end a run: what takes no more rows is left, and said.
"""
import contextlib
import importlib.util
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flora.errors import ConfigError, RunError
from flora.files import write_text

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes the rows of a run, in order. name: what it is called in a message."""
    name: str

    def add(self, row: Row) -> None: ...

    def close(self, failed: bool = False) -> None: ...


def scalars(row: Row) -> tuple[int, dict[str, float]]:
    """A row as rounds done and numbers by name: global/, bytes/, speed/, seconds/, run/ of the server; of a client its training
    loss (client_loss/NAME) and what was measured before and after (client_loss_before/NAME, ...)."""
    if row["kind"] == "failure":
        return row["round"] + 1, {}
    if row["kind"] == "client":
        name = row["client"]
        found = {f"client_loss/{name}": row["loss"], **{
            f"client_{key.removeprefix('eval_')}/{name}": value for key, value in row.items() if key.startswith("eval_")}}
        return row["round"] + 1, _numbers(found)
    found = {}
    for key, value in row.items():
        if key == "seconds":
            found |= {f"seconds/{phase}": took for phase, took in value.items()}
        elif key.startswith("eval_"):
            found[f"global/{key.removeprefix('eval_')}"] = value
        elif key.startswith("bytes_"):
            found[f"bytes/{key.removeprefix('bytes_')}"] = value
        elif key != "rounds_done":
            found[f"{'speed' if key == 'tokens_per_second' else 'run'}/{key}"] = value
    return row["rounds_done"], _numbers(found)


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}


class TensorBoard:
    """Event files in FOLDER/tensorboard, one for each time that the run was started.

    first: the round that it goes on at. A reader of TensorBoard then drops what an earlier file says of later rounds. A round is on
    the disk when its server's row is. Written here and now, without the queue and thread of tensorboardX's SummaryWriter: it would
    wait for ever for a thread that a full disk has ended.
    """
    name = "TensorBoard"

    def __init__(self, folder: Path, first: int = 0):
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        where = folder / "tensorboard"
        where.mkdir(parents=True, exist_ok=True)
        again = any(where.iterdir())
        self._file = RecordWriter(str(where / f"events.out.tfevents.{time.time():.6f}"))        # read in the order of their names
        self._write(file_version="brain.Event:2")
        if again:
            self._write(step=first + 1 if first else 0, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def add(self, row: Row) -> None:
        step, values = scalars(row)
        if values:
            held = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            self._write(step=step, summary=self._summary(value=held))
        if row["kind"] == "server":
            self._file.flush()

    def close(self, failed: bool = False) -> None:
        self._file.flush()
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class WandB:
    """A run of Weights & Biases: its project is WANDB_PROJECT or "flora", its id is in FOLDER/wandb-id, so a resumed run is the
    same one there. WANDB_MODE=offline writes to FOLDER/wandb alone. Raises RunError where it cannot begin."""
    name = "wandb"

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        path = folder / "wandb-id"
        if not path.exists():
            write_text(path, secrets.token_hex(8) + "\n")
        try:                                                    # console: it would catch what the display draws
            self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "flora"), id=path.read_text().strip(), resume="allow",
                                   name=folder.name, dir=str(folder), config=dict(settings),
                                   settings=wandb.Settings(silent=bool(settings.get("quiet")), console="off"))
        except Exception as error:
            raise RunError(f"report_to: wandb does not begin: {error}. Log in (wandb login), set WANDB_MODE=offline, or leave "
                           "wandb out.") from error
        self._held: dict[str, float] = {}

    def add(self, row: Row) -> None:
        step, values = scalars(row)
        self._held |= values
        if row["kind"] == "server":
            self._run.log(self._held, step=step)
            self._held = {}

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def check(report_to: Sequence[str]) -> None:
    """Raises ConfigError where what is asked for is not installed, before anything is read."""
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise ConfigError("report_to: expected the package wandb, which it asks for; got none. pip install wandb, or leave it out.")


def trackers(report_to: Sequence[str], folder: Path, first: int, settings: Mapping[str, Any],
             say: Callable[[str], None]) -> "Tracked":
    """What takes the rows of a run in this folder that begins or goes on at round `first`. settings: of the run, for wandb; say:
    told what gets no rows. Raises RunError."""
    found: list[Tracker] = []
    if "tensorboard" in report_to:
        try:
            found.append(TensorBoard(folder, first))
        except ImportError:
            say("no event files for TensorBoard: pip install tensorboardX")
        except OSError as error:
            say(f"no event files for TensorBoard: {error}")
    if "wandb" in report_to:
        found.append(WandB(folder, settings))
    return Tracked(found, say)


class Tracked:
    """Several trackers as one that raises nothing: what fails is closed and said, once."""

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], None]):
        self._trackers, self._say = list(trackers), say

    def add(self, row: Row) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.add(row)
            except Exception as error:                          # wandb's are of many classes, and a disk's are no reason to stop
                self._trackers.remove(tracker)
                self._say(f"{tracker.name} gets no more rows: {error}. metrics.jsonl has all of them.")
                with contextlib.suppress(Exception):
                    tracker.close(True)

    def close(self, failed: bool = False) -> None:
        for tracker in self._trackers:
            with contextlib.suppress(Exception):
                tracker.close(failed)
        self._trackers.clear()

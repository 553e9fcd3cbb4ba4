"""The run folder: what a run writes, so that a person can read it, PEFT can load it, and another process can go on.

    config.yaml  environment.json  run.json     the resolved settings, versions and kernels, how far it came
    metrics.jsonl                               one JSON row a client and round, one a server evaluation
    rounds/NUMBER/clients/NAME, .../aggregate   adapters in PEFT's format, of the last keep_rounds rounds; .../start: the part
                                                of the aggregate that training goes on from, where there is one
    checkpoint/NUMBER                           what resume needs; only while the run is unfinished
    model/                                      the merged model and its tokenizer, when the run is finished
    tensorboard/                                event files of the rows, for TensorBoard
    profile/                                    a trace of some passes and its operators, with profile
    wandb/  wandb-id                            what wandb writes, and the id under which it goes on, with report_to: wandb
    privacy.key                                 the secret of its noise, with privacy; not to be passed on
    adapter/                                    in its place, where updates stay beside the base (merge_into: adapter)

A folder appears under its name only when it is whole and on the disk: a failed write, a killed process and a loss of power lose the
write at hand and nothing else. The newest checkpoint is the one of the largest number. One process at a time writes.
"""
import contextlib
import errno
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from flora.errors import RunError
from flora.files import LOCK, hold, leftover, make_folder, release, remove, safe_name, staged, sweep, write_text
from flora.formats import save_peft
from flora.group import concatenated
from flora.keystream import KEY_BYTES
from flora.messages import Broadcast, Update
from flora.nn import accumulated
from flora.server import Server
from flora.snapshot import Carried, Resumed, read_snapshot, save_pretrained, write_snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATES = ("running", "interrupted", "failed", "finished")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of the file system into a RunError that says what is still whole and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:                 # safetensors tells of a full disk in a class of its own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)
        raise RunError(f"cannot write to {folder}: {'the disk is full' if full else error}. Rounds written before are whole; "
                       f"make room (or set keep_rounds: 0), then: flora resume {folder}") from error


def state_of(folder: Path) -> dict[str, Any]:
    """{"state": "running" | "interrupted" | "failed" | "finished", "rounds_done"}; empty where there is no run of ours:
    a run.json of another program must not make its folder ours to replace."""
    try:
        state = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    ours = isinstance(state, dict) and set(state) == {"state", "rounds_done"} and state["state"] in STATES
    return state if ours else {}


def _drop(old: Path) -> None:
    """Removes what is needed no more; a disk that refuses even that keeps it for now."""
    with contextlib.suppress(OSError):
        remove(old) if old.exists() else None


class RunFolder:
    """Writes one run. Raises RunError where the folder holds a run already (unless overwrite or resume) or cannot be written.

    A context manager: while it is open no other process writes to the folder, and what a killed one left there is gone."""

    def __init__(self, path: str | Path, overwrite: bool = False, resume: bool = False):
        self.path, self._overwrite, self._resume = Path(path).expanduser(), overwrite, resume
        self._lock: int | None = None
        self._check()

    def _check(self) -> None:
        state, overwrite = self.state(), self._overwrite
        if self._resume:
            if not state:
                raise RunError(f"expected a run to resume at {self.path}; got a folder without run.json")
            if state["state"] == "finished":
                self._tidy()
                raise RunError(f"the run at {self.path} is finished ({state['rounds_done']} rounds); there is nothing to resume. "
                               "Start another with its own output_dir.")
        elif state and not overwrite and self._holds_work():
            raise RunError(f"{self.path} holds a run already ({state['state']}, {state['rounds_done']} rounds). Choose another "
                           f"--output_dir, go on with `flora resume {self.path}`, or replace it with --overwrite.")
        elif not state and self.path.exists() and (
                not self.path.is_dir() or not all(leftover(e.name) or e.name == LOCK for e in self.path.iterdir())):
            raise RunError(f"{self.path} exists and is not a run of flora, so it is not written to. Choose another --output_dir.")

    def __enter__(self) -> "RunFolder":
        with disk_errors(self.path):
            if self.path.exists():
                self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            release(self.path, self._lock)
            self._lock = None

    def _hold(self) -> None:
        """Shuts out others, looks again at what is there now, and sweeps it."""
        if self._lock is not None:
            return
        self._lock = hold(self.path)
        try:
            self._check()
            for folder in (self.path, self.path / "rounds", self.path / "checkpoint"):
                sweep(folder)
        except BaseException:
            self.__exit__()
            raise

    def _tidy(self) -> None:
        """Removes what a process that was killed in its last act left of a finished run."""
        with contextlib.suppress(OSError, RunError):            # it may be at it still
            handle = hold(self.path)
            _drop(self.path / "checkpoint")
            sweep(self.path)
            release(self.path, handle)

    def _holds_work(self) -> bool:
        """A run that failed before its first row holds nothing to protect."""
        metrics = self.path / "metrics.jsonl"
        return (metrics.exists() and metrics.stat().st_size > 0) or any(
            (self.path / name).exists() for name in ("rounds", "checkpoint", "model"))

    def state(self) -> dict[str, Any]:
        """As state_of says it."""
        return state_of(self.path)

    def mark(self, state: str, rounds_done: int) -> None:
        """Writes how far the run came; a finished run needs its checkpoint no more."""
        with disk_errors(self.path):
            write_text(self.path / "run.json", json.dumps({"state": state, "rounds_done": rounds_done}) + "\n")
        if state == "finished":
            _drop(self.path / "checkpoint")

    def stopped(self, state: str) -> None:
        """Marks a run that ends before its time, after the rounds that it has done; a finished one stays so."""
        known = self.state()
        if known.get("state") != "finished":
            self.mark(state, known.get("rounds_done", 0))

    def begin(self, config_yaml: str, environment: Mapping[str, Any], rounds_done: int = 0) -> None:
        """Marks the run as running, and writes the resolved config and the environment; only now, when the new run can start, a run
        to overwrite goes, from its checkpoint on, so what is left of it at any moment can be resumed or overwritten."""
        with disk_errors(self.path):
            make_folder(self.path)
            self._hold()
            replaced = self.state() if self._overwrite and not self._resume else {}
            self.mark("running", rounds_done)
            kept = ("run.json", "config.yaml", "environment.json", LOCK)
            for path in sorted(self.path.iterdir()) if replaced else ():
                if path.name not in kept:
                    remove(path)
            self._overwrite = False
            write_text(self.path / "config.yaml", config_yaml)
            write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def secret(self, resumed: bool) -> bytes:
        """The 32 secret bytes of this run, for its noise: drawn when it begins, kept in privacy.key for its owner alone. Raises
        RunError where a run that goes on has lost them: it could not repeat what it has released."""
        path = self.path / "privacy.key"
        with disk_errors(self.path):
            if not path.exists() and not resumed:
                write_text(path, secrets.token_hex(KEY_BYTES) + "\n", private=True)
            key = bytes.fromhex(path.read_text()) if path.exists() else b""
        if len(key) != KEY_BYTES:
            raise RunError(f"expected the key of this run's noise in {path}; got {'none' if not key else 'another file'}. Put it "
                           "back, or start the run again with --overwrite.")
        return key

    def save_round(self, number: int, updates: Sequence[Update], broadcast: Broadcast, keep: int, base_model: str) -> None:
        """Writes in PEFT's format every client's adapters, the aggregate (merge and start together: a stack of both), and the
        start alone, where training continues; drops rounds beyond `keep`. Whole weights (full fine-tuning) are not kept."""
        if keep == 0 or not any(update.adapters for update in updates):
            return
        with disk_errors(self.path), staged(self.path / "rounds" / str(number)) as folder:
            for update in updates:
                save_peft(update.adapters, folder / "clients" / safe_name(update.client), base_model)
            parts = [part for part in (broadcast.merge, broadcast.start) if part]
            if parts:
                save_peft(concatenated(parts), folder / "aggregate", base_model)
            if broadcast.base:
                write_text(folder / "dense.json", json.dumps(list(broadcast.base)))
            if broadcast.start:
                save_peft(broadcast.start, folder / "start", base_model)
        for old in (self.path / "rounds").iterdir():
            if old.name.isdigit() and int(old.name) <= number - keep:
                _drop(old)

    def save_checkpoint(self, model: "PreTrainedModel", number: int, server: Server, carried: Carried) -> None:
        """Writes what resume needs: `number` is the next round. The ones before go."""
        with disk_errors(self.path), staged(self.path / "checkpoint" / str(number)) as folder:
            write_snapshot(folder, model, server, carried)
        for old in (self.path / "checkpoint").iterdir():
            if old.name.isdigit() and old.name != str(number):
                _drop(old)

    def load_checkpoint(self) -> Resumed | None:
        """The newest checkpoint; None where the run had not finished a round. Raises RunError where it cannot be read."""
        folders = [f for f in (self.path / "checkpoint").glob("*") if f.name.isdigit()]
        return read_snapshot(max(folders, key=lambda f: int(f.name))) if folders else None

    def save_model(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> Path:
        """Writes the result and returns where: model/, merged, with its tokenizer; or adapter/ in PEFT's format, where the base was
        not written to."""
        beside = accumulated(model)
        with disk_errors(self.path), staged(self.path / ("adapter" if beside else "model")) as folder:
            if beside:
                save_peft(beside, folder, base_model)
            else:
                save_pretrained(model, folder)
                tokenizer.save_pretrained(folder)
        return self.path / ("adapter" if beside else "model")

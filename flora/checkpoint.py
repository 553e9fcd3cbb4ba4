"""The run folder: what a run writes, so that a person can read it, PEFT can load it, and another process can go on.

    config.yaml  environment.json  run.json     the resolved settings, versions and kernels, how far it came
    metrics.jsonl                               one JSON row a client and round, one a server evaluation
    rounds/NUMBER/clients/NAME, .../aggregate   adapters in PEFT's format, of the last keep_rounds rounds; .../start: the part
                                                of the aggregate that training goes on from, where there is one
    checkpoint/NUMBER                           what resume needs; only while the run is unfinished
    model/                                      the merged model and its tokenizer, when the run is finished
    adapter/                                    in its place, where updates stay beside the base (merge_into: adapter)

A folder appears under its name only when it is whole, so an interrupted or failed write loses that write and nothing else.
"""
import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from flora.adapter import Adapters
from flora.data.fetch import no_progress_bars
from flora.errors import RunError
from flora.files import safe_name, staged, write_text
from flora.formats import save_peft
from flora.group import concatenated, leaves
from flora.limits import UNLIMITED
from flora.messages import Broadcast, Update, decode, encode
from flora.nn import accumulated, residuals
from flora.server import Server

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATES = ("running", "interrupted", "failed", "finished")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the next round, the broadcast that is due, the base that it stands on (None: the original), what stayed
    at home, by client, by layer what the base's merges left (residuals) or what is kept beside it, the clients' ranks now,
    the bytes that each of them got for this round, and their optimizers' moments where those are kept."""
    number: int
    broadcast: Broadcast
    base: Path | None
    home: dict[str, Adapters]
    residuals: dict[str, Tensor]
    beside: Adapters
    ranks: dict[str, int]
    received: dict[str, int]
    optimizers: dict[str, dict[str, Tensor]] | None


def _save_pretrained(model: "PreTrainedModel", folder: Path) -> None:
    """As transformers writes it, without its progress bar amid ours."""
    with no_progress_bars():
        model.save_pretrained(folder)


def _moments(folder: Path) -> dict[str, dict[str, Tensor]] | None:
    """The optimizers' moments of a checkpoint, by client; None where they are not kept."""
    names = folder / "optimizers.json"
    return {name: safetensors.torch.load_file(folder / f"optimizer-{i:06}.safetensors")
            for i, name in enumerate(json.loads(names.read_text()))} if names.exists() else None


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


class RunFolder:
    """Writes one run. Raises RunError where the folder holds a run already (unless overwrite or resume) or cannot be written."""

    def __init__(self, path: str | Path, overwrite: bool = False, resume: bool = False):
        self.path = Path(path).expanduser()
        state = self.state()
        if resume:
            if not state:
                raise RunError(f"expected a run to resume at {self.path}; got a folder without run.json")
            if state["state"] == "finished":
                raise RunError(f"the run at {self.path} is finished ({state['rounds_done']} rounds); there is nothing to resume. "
                               "Start another with its own output_dir.")
        elif state and not overwrite and self._holds_work():
            raise RunError(f"{self.path} holds a run already ({state['state']}, {state['rounds_done']} rounds). Choose another "
                           f"--output_dir, go on with `flora resume {self.path}`, or replace it with --overwrite.")
        elif not state and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} exists and is not a run of flora, so it is not written to. Choose another --output_dir.")
        self._replaces = bool(state) and overwrite and not resume

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
            shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    def begin(self, config_yaml: str, environment: Mapping[str, Any]) -> None:
        """Writes the resolved config and the environment; only now, when the new run can start, a run to overwrite goes."""
        with disk_errors(self.path):
            if self._replaces:
                shutil.rmtree(self.path)
                self._replaces = False
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", config_yaml)
            write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

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
                shutil.rmtree(old, ignore_errors=True)

    def save_checkpoint(self, model: "PreTrainedModel", number: int, server: Server, received: Mapping[str, int],
                        home: Mapping[str, Adapters], optimizers: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Writes what resume needs: `number` is the next round. The base is written only if merges have changed it."""
        merged = model.__dict__.get("_flora_merged", False)
        with disk_errors(self.path), staged(self.path / "checkpoint" / str(number)) as folder:
            (folder / "broadcast.safetensors").write_bytes(encode(server.broadcast, whole=True))
            ranks = {client.name: client.rank for client in leaves(server.clients)}
            write_text(folder / "clients.json", json.dumps({"ranks": ranks, "received": dict(received)}))
            if optimizers is not None:
                write_text(folder / "optimizers.json", json.dumps(list(optimizers)))
                for i, moments in enumerate(optimizers.values()):
                    safetensors.torch.save_file(dict(moments), folder / f"optimizer-{i:06}.safetensors")
            for i, (client, adapters) in enumerate(home.items()):
                (folder / f"home-{i:06}.safetensors").write_bytes(encode(Update(adapters, 1, client=client)))
            if merged:
                _save_pretrained(model, folder / "base")
            if residuals(model):
                safetensors.torch.save_file(residuals(model), folder / "residuals.safetensors")
            if beside := accumulated(model):
                (folder / "beside.safetensors").write_bytes(encode(Broadcast(merge=beside)))
        for old in (self.path / "checkpoint").iterdir():
            if old.name != str(number):
                shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self) -> Resumed | None:
        """The newest checkpoint; None where the run had not finished a round."""
        folders = [f for f in (self.path / "checkpoint").glob("*") if f.name.isdigit()]
        if not folders:
            return None
        folder = max(folders, key=lambda f: int(f.name))
        broadcast = decode((folder / "broadcast.safetensors").read_bytes(), limits=UNLIMITED)
        home = [decode(file.read_bytes(), limits=UNLIMITED) for file in sorted(folder.glob("home-*.safetensors"))]
        base = folder / "base"
        rest, beside = folder / "residuals.safetensors", folder / "beside.safetensors"
        return Resumed(int(folder.name), broadcast, base if base.exists() else None, {u.client: u.adapters for u in home},
                       safetensors.torch.load_file(rest) if rest.exists() else {},
                       decode(beside.read_bytes(), limits=UNLIMITED).merge if beside.exists() else {},
                       **json.loads((folder / "clients.json").read_text()), optimizers=_moments(folder))

    def save_model(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> Path:
        """Writes the result and returns where: model/, merged, with its tokenizer; or adapter/ in PEFT's format, where the base was
        not written to."""
        beside = accumulated(model)
        with disk_errors(self.path), staged(self.path / ("adapter" if beside else "model")) as folder:
            if beside:
                save_peft(beside, folder, base_model)
            else:
                _save_pretrained(model, folder)
                tokenizer.save_pretrained(folder)
        return self.path / ("adapter" if beside else "model")

"""What a checkpoint holds: all that a round depends on and that the config, the data and the seeds do not give again.

    broadcast.safetensors  state.json        what is due, and the small numbers beside it
    home-*, optimizer-*, late-*.safetensors  what clients keep from round to round, and updates that the next round takes
    base/  residuals.  beside.safetensors    the base, where merges have changed it, what they left, what is kept beside it
    merge-VERSION.safetensors                what the server remembers for clients that missed rounds; hard links to the files of
                                             the checkpoints that wrote them first

Whatever is drawn (rows, fresh ranks, dropout, sampled clients) is keyed by seed, name and version, so no generator is kept.
"""
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from flora.adapter import Adapters
from flora.data.fetch import no_progress_bars
from flora.errors import MessageError, RunError
from flora.group import leaves
from flora.limits import UNLIMITED
from flora.messages import Broadcast, Update, decode, encode
from flora.nn import accumulated, residuals
from flora.server import Server
from flora.versions import merge_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

@dataclass(frozen=True)
class Carried:
    """What goes from round to round beside the server and the model: bytes that every client got for the round that is due, what
    stayed at home, by client, the optimizers' moments, where those are kept, the budget of tokens (Budget.state), and updates that
    the next round takes, by client."""
    received: Mapping[str, int] = field(default_factory=dict)
    home: Mapping[str, Adapters] = field(default_factory=dict)
    optimizers: Mapping[str, Mapping[str, Tensor]] | None = None
    budget: Mapping[str, Any] | None = None
    late: Mapping[str, Update] = field(default_factory=dict)


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the next round, the broadcast that is due, the base that it stands on (None: the original), what stayed
    at home, by client, by layer what the base's merges left (residuals) or what is kept beside it, the clients' ranks now,
    the bytes that each of them got for this round, and their optimizers' moments where those are kept. budget: of tokens, as
    Budget.state; downlink_error, merge_errors: what the last downlink and the last sum beside the base left out; layers, merges:
    what the server remembers for clients that missed rounds; late: updates that this round takes."""
    number: int
    broadcast: Broadcast
    base: Path | None
    home: dict[str, Adapters]
    residuals: dict[str, Tensor]
    beside: Adapters
    optimizers: dict[str, dict[str, Tensor]] | None
    merges: dict[int, Adapters]
    late: dict[str, Update]
    ranks: dict[str, int]
    received: dict[str, int]
    budget: dict[str, Any] | None
    downlink_error: float
    merge_errors: dict[str, float] | None
    layers: list[str]

    def remind(self, server: Server) -> None:
        """Gives a server that was made of this broadcast what else it knew when the checkpoint was written."""
        server.downlink_error = self.downlink_error
        server._layers, server._merges = set(self.layers), dict(self.merges)
        server.changed = max([server.changed, *self.merges])


def save_pretrained(model: "PreTrainedModel", folder: Path) -> None:
    """As transformers writes it, without its progress bar amid ours."""
    with no_progress_bars():
        model.save_pretrained(folder)


def write_snapshot(folder: Path, model: "PreTrainedModel", server: Server, carried: Carried) -> None:
    """Fills the folder of a checkpoint; other checkpoints lie beside it. The base is written only if merges have changed it."""
    (folder / "broadcast.safetensors").write_bytes(encode(server.broadcast, whole=True))
    ranks = {client.name: client.rank for client in leaves(server.clients)}
    (folder / "state.json").write_text(json.dumps({
        "ranks": ranks, "received": dict(carried.received), "budget": carried.budget, "downlink_error": server.downlink_error,
        "merge_errors": merge_errors(model), "layers": sorted(server._layers)}))
    _write_merges(folder, server._merges, server.broadcast)
    if carried.optimizers is not None:
        (folder / "optimizers.json").write_text(json.dumps(list(carried.optimizers)))
        for i, moments in enumerate(carried.optimizers.values()):
            safetensors.torch.save_file(dict(moments), folder / f"optimizer-{i:06}.safetensors")
    for i, (client, adapters) in enumerate(carried.home.items()):
        (folder / f"home-{i:06}.safetensors").write_bytes(encode(Update(adapters, 1, client=client)))
    for i, update in enumerate(carried.late.values()):
        (folder / f"late-{i:06}.safetensors").write_bytes(encode(update))
    if model.__dict__.get("_flora_merged", False):
        save_pretrained(model, folder / "base")
    if residuals(model):
        safetensors.torch.save_file(residuals(model), folder / "residuals.safetensors")
    if beside := accumulated(model):
        (folder / "beside.safetensors").write_bytes(encode(Broadcast(merge=beside)))


def _write_merges(folder: Path, merges: Mapping[int, Adapters], due: Broadcast) -> None:
    """The merges that a server remembers, by version: a merge is written once, however many checkpoints have it."""
    known = {file.name: file for file in folder.parent.glob("[0-9]*/merge-*.safetensors")}
    known |= {_merge_name(due.version): folder / "broadcast.safetensors"} if due.merge is not None else {}
    for version, merge in merges.items():
        name = _merge_name(version)
        if name not in known:
            (folder / name).write_bytes(encode(Broadcast(merge=merge, version=version)))
            continue
        try:
            os.link(known[name], folder / name)
        except OSError:                                         # a file system without hard links
            shutil.copyfile(known[name], folder / name)


def _merge_name(version: int) -> str:
    return f"merge-{version:09}.safetensors"


def read_snapshot(folder: Path) -> Resumed:
    """What write_snapshot wrote; the folder's name is the next round. Raises RunError where it cannot be read."""
    try:
        return _read(folder)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, MessageError) as error:
        raise RunError(f"expected a whole checkpoint at {folder}; it cannot be read ({error}). What wrote it was another version "
                       "of flora, or the disk has lost it: start the run again, with --overwrite.") from error


def _read(folder: Path) -> Resumed:
    def decoded(name: str) -> list[Update | Broadcast]:
        return [decode(file.read_bytes(), limits=UNLIMITED) for file in sorted(folder.glob(name))]

    [broadcast], beside = decoded("broadcast.safetensors"), decoded("beside.safetensors")
    base, rest = folder / "base", folder / "residuals.safetensors"
    return Resumed(int(folder.name), broadcast, base if base.exists() else None,
                   {update.client: update.adapters for update in decoded("home-*.safetensors")},
                   safetensors.torch.load_file(rest) if rest.exists() else {}, beside[0].merge if beside else {},
                   _moments(folder), {made.version: made.merge for made in decoded("merge-*.safetensors")},
                   {update.client: update for update in decoded("late-*.safetensors")},
                   **json.loads((folder / "state.json").read_text()))


def _moments(folder: Path) -> dict[str, dict[str, Tensor]] | None:
    """The optimizers' moments of a checkpoint, by client; None where they are not kept."""
    names = folder / "optimizers.json"
    return {name: safetensors.torch.load_file(folder / f"optimizer-{i:06}.safetensors")
            for i, name in enumerate(json.loads(names.read_text()))} if names.exists() else None

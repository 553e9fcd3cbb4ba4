"""What changed the base, version after version, on the disk: a server sends from it, a client that starts again replays it.

    FOLDER/RUN/000001.safetensors    what version 1 changed: its merge, or weights in its place; no start
"""
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flora.errors import MessageError
from flora.files import safe_name
from flora.messages import Broadcast, Limits, decode, encode

OWN = Limits(max_bytes=1 << 62, max_header_bytes=1 << 40, max_rank=1 << 40)     # what this program wrote itself, it reads
WEEK = 7 * 86400


class MergeLog:
    """The log of one run. Several processes may write it: a file is whole or not there, and all would write the same bytes."""

    def __init__(self, folder: Path, run: str):
        self.folder = folder / safe_name(run)

    def add(self, broadcast: Broadcast) -> None:
        """Keeps what this version changed; nothing where it changed nothing, or is there already."""
        target = self.folder / f"{broadcast.version:06}.safetensors"
        if (broadcast.merge is None and broadcast.base is None) or target.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(encode(replace(broadcast, start=None), whole=True))
        os.replace(name, target)

    def read(self, first: int = 0, last: int | None = None) -> Iterator[Broadcast]:
        """What versions first + 1 to last changed, in order; ends before a file that is not whole."""
        for path in sorted(self.folder.glob("*.safetensors")):
            number = int(path.stem) if re.fullmatch(r"\d+", path.stem) else -1
            if number <= first or (last is not None and number > last):
                continue
            try:
                yield decode(path.read_bytes(), limits=OWN)
            except (MessageError, OSError):
                return

    def clear(self) -> None:
        """Forgets the run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear_old(self) -> None:
        """Forgets other runs that nobody has written to for a week."""
        for other in self.folder.parent.glob("*"):
            if other != self.folder and other.is_dir() and time.time() - other.stat().st_mtime > WEEK:
                shutil.rmtree(other, ignore_errors=True)

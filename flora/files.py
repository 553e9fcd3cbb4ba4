"""Files that are whole or not there."""
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = "-before"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside target that takes its name when the block ends well, and vanishes when it does not.

    A folder that target names is put aside, not deleted, until the new one has its name. What a killed process left for this target
    is removed (or put back, if it was put aside); one process at a time may work on a target.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".flora-{hashlib.sha256(target.name.encode()).hexdigest()[:12]}-"
    for stale in target.parent.glob(prefix + "*"):
        if stale.name.endswith(ASIDE) and not target.exists():
            os.replace(stale, target)
        else:
            shutil.rmtree(stale, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    aside = stage.with_name(stage.name + ASIDE)
    os.umask(mask := os.umask(0))
    stage.chmod(0o777 & ~mask)
    try:
        yield stage
        if target.exists():
            os.replace(target, aside)
        os.replace(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader finds the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def safe_name(name: str) -> str:
    """A client's name as a folder's name; two names never share one."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")
    return plain if plain == name and name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

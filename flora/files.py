"""Files that are whole or not there, after a crash and after a loss of power too, and the one process that may write to a folder.

A name is given only to what the disk holds already: content is flushed (fsync), then named, then the folder that holds the name is
flushed. A name is taken away before what it stood for is deleted. So whatever has a name can be trusted, at every moment.
"""
import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flora.errors import RunError

OURS = ".flora-"                                                # what a killed process leaves begins so, or is .NAME.new
ASIDE, LOCK = "-before", ".lock"


def sync(path: Path) -> None:
    """Waits until the disk holds a file's content, or a folder's names (where the system can: Windows flushes no folder)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """The same for all that is in a folder, and itself."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, whose names last."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def _prefix(target: Path) -> str:
    return f"{OURS}{hashlib.sha256(target.name.encode()).hexdigest()[:12]}-"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside target that takes its name when the block ends well, and vanishes when it does not.

    A folder that target names is put aside, not deleted, until the new one has its name. What a killed process left for this target
    is removed (or put back, if it was put aside); one process at a time may work on a target.
    """
    target = target.resolve()
    make_folder(target.parent)
    prefix = _prefix(target)
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
        sync_tree(stage)
        if target.exists():
            os.replace(target, aside)
        os.replace(stage, target)
        sync(target.parent)                                     # the old one is deleted only when the new name lasts
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Writes a file so that a reader finds the old content or the new, never half of it, whatever happens. private: for its owner
    alone."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        if private:
            temporary.unlink(missing_ok=True)
            temporary.touch(0o600, exist_ok=False)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, text: str, lasting: bool) -> None:
    """Adds text at the end of a file. lasting: waits until the disk holds all of the file; else a crash may cut it short."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        if lasting:
            file.flush()
            os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Deletes a file or a folder; its name goes first and at once, so no half of a folder is ever found under it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(_prefix(path) + secrets.token_hex(4))
    os.replace(path, gone)
    sync(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a killed process left in a folder, but for what it had put aside, which `staged` puts back. The caller holds the
    folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if leftover(path.name) and not path.name.endswith(ASIDE):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def leftover(name: str) -> bool:
    """Whether a name is one that only a write in progress has."""
    return name.startswith(OURS) or bool(re.fullmatch(r"\..+\.new", name))


def hold(folder: Path) -> int:
    """Makes this process the one that may write to a folder, until `release` or its end, however it ends. Gives what release takes.

    Raises RunError where another holds it, and says who. Without flock (Windows, some network file systems) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        return -1
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = _is(path, handle)
        except OSError as error:
            who = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return -1
            if not isinstance(error, BlockingIOError):
                raise
            raise RunError(f"expected {folder} for this process alone; {who or 'another process'} is writing to it. Wait for it, "
                           "or stop it: its lock goes with it.") from None
        if mine:
            break
        os.close(handle)                                        # its holder has just taken the file away: there is another, or none
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    return handle


def _is(path: Path, handle: int) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def release(folder: Path, handle: int) -> None:
    """Gives up what hold gave."""
    if handle >= 0:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)


def safe_name(name: str) -> str:
    """A client's name as a folder's name; two names never share one."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")
    return plain if plain == name and name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

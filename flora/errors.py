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
    """Bytes that are not a message, or a message that its receiver does not accept. Each reason is a class of its own."""


class MessageFormatError(MessageError):
    """Not a message of this format: the container, its header's spelling, its fields and their types, names that are no text."""


class MessageSizeError(MessageError):
    """More bytes, layers, metrics or memory than the limits allow."""


class MessageDigestError(MessageError):
    """The digest is not that of the content: something changed on the way."""


class MessageVersionError(MessageError):
    """Of another version of the base, or encoded with a broadcast that the receiver does not hold."""


class MessageLayerError(MessageError):
    """Layers that are not expected, come twice, or lack a tensor; tensors of layers that are not listed."""


class MessageShapeError(MessageError):
    """A tensor that is empty, or whose shape does not fit its layer or the other factor."""


class MessageRankError(MessageError):
    """Ranks above the limits, or those of a core that are not those sent."""


class MessageDtypeError(MessageError):
    """A dtype that is no factor's, or that the receiver does not accept."""


class MessageValueError(MessageError):
    """Numbers that are not finite, or that multiply to what is not."""


class MessageCountError(MessageError):
    """A number of examples that is not between 1 and the cap."""


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
    """Around the import of an optional package: where it is missing, ConfigError says how to install it (flora[extra])."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"expected {package}; it cannot be imported ({error}). pip install 'flora[{extra}]'") from error

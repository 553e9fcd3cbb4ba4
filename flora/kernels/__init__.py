"""Which code runs an operator: `resolve(op, device)` picks a backend, `use(name)` forces one, `table()` says what and why.

The order is fixed: triton, native, reference; the first that has the operator for the device and could be imported is
taken. A backend is imported when it is first asked for, and one that cannot be is listed with its reason, never hidden.
"""
import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from flora.errors import BackendError

BACKENDS = ("triton", "native", "reference")
OPERATORS = ("lora_linear", "lora_linear_backward", "lora_add_", "merge_", "checked_merge_", "stack_")

_forced: str | None = None


class Choice(NamedTuple):
    """What runs one operator on one kind of device, and why."""
    operator: str
    device: str
    backend: str
    why: str


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """(the backend's module, "") or (None, why it cannot be used here)."""
    path = f"flora.kernels.{name}"
    spec = importlib.util.find_spec(path)
    if spec is None or spec.origin is None:
        return None, "not part of this version"
    try:
        return importlib.import_module(path), ""
    except ImportError as error:
        return None, str(error)


def _missing(name: str, op: str, device: str, dtype: torch.dtype | None = None) -> str:
    """Why a backend cannot run an operator on a kind of device, in a dtype (None: in any); "" where it can.

    A backend names its devices in OPERATORS, those it takes only when forced in WHEN_FORCED, what it cannot compute in REFUSED.
    """
    module, why = _load(name)
    if module is None:
        return why
    devices, forced = module.OPERATORS.get(op, ()), getattr(module, "WHEN_FORCED", {}).get(op, ())
    refused: str = getattr(module, "REFUSED", {}).get((device, dtype), "")
    if device in devices or "*" in devices:
        return refused
    if device in forced:
        return refused if name == _forced else f"on {device} it runs only when forced (kernels.use)"
    return f"it has no {op}" + (f" for {device}, only for {', '.join(devices)}" if devices else "")


def _choose(op: str, device: str, dtype: torch.dtype | None = None) -> Choice:
    reasons: list[str] = []
    for name in (_forced,) if _forced else BACKENDS:
        why = _missing(name, op, device, dtype)
        if not why:
            return Choice(op, device, name, "forced by kernels.use" if _forced else "; ".join(reasons) or "first choice")
        reasons.append(f"{name}: {why}")
    if _forced is None:
        raise BackendError(f"no backend has {op!r} for {device}; there are {', '.join(OPERATORS)}")
    raise BackendError(f"{op} on {device} was forced to run on {_forced!r}, which cannot: {reasons[0]}. "
                       f"Leave the `with flora.kernels.use({_forced!r})` block, or see `flora doctor`.")


def resolve(op: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """The function that runs an operator on a device in a dtype. Raises BackendError where a forced backend cannot."""
    return _function(op, device.type if isinstance(device, torch.device) else torch.device(device).type, dtype, _forced)


@functools.cache
def _function(op: str, device: str, dtype: torch.dtype | None, forced: str | None) -> Callable[..., Any]:
    """resolve, remembered: 224 layers ask at every pass."""
    found: Callable[..., Any] = getattr(_load(_choose(op, device, dtype).backend)[0], op)
    return found


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Forces a backend ("triton", "native", "reference") for the whole process while the block runs.

    Raises BackendError at once if the backend cannot be imported here, and at the call if it lacks the operator.
    """
    global _forced
    if name not in BACKENDS:
        raise BackendError(f"expected a backend out of {', '.join(BACKENDS)}; got {name!r}")
    module, why = _load(name)
    if module is None:
        raise BackendError(f"backend {name!r} was asked for and cannot run here: {why}. See `flora doctor`.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def table() -> list[Choice]:
    """What each operator uses on the devices of this machine, and why the faster backends are not used."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [_choose(op, device) for device in devices for op in OPERATORS if not _forced or not _missing(_forced, op, device)]

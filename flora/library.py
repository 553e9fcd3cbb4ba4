"""The operator library `flora`: an operator is defined once, so torch.compile sees it whole; inside, the device picks a backend."""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flora import kernels

_HERE: AbstractContextManager[None] = nullcontext()
LIB = torch.library.Library("flora", "DEF")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, where it is not: kernels are launched there, whatever their tensors' device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _HERE


def implement(op: str, written: int = 0, call: Callable[..., Any] | None = None) -> None:
    """Registers an operator's body: `call`, or else the backend of the first tensor's device and dtype; on that device, without
    autocast; versions of what is written in place (the first `written`) rise."""
    def body(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        kernel = call or kernels.resolve(op, first.device, first.dtype)
        casts = torch.is_autocast_enabled(first.device.type)          # asking costs less than entering the block
        with _on(first.device), torch.autocast(first.device.type, enabled=False) if casts else _HERE:
            result = kernel(*args)
        for target in args[:written]:
            torch.autograd.graph.increment_version(target)
        return result
    LIB.impl(op, body, "CompositeExplicitAutograd")


def writes_only(op: str, check: Callable[..., None] = lambda *args: None) -> None:
    """The fake kernel of an operator that returns nothing. check: raises for arguments that do not fit."""
    torch.library.register_fake(f"flora::{op}", check, lib=LIB)

"""How many tokens a pass may hold: what is fastest on a device, unless its memory holds less."""
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flora.errors import ConfigError
from flora.packing import device_of
from flora.sharded import holds_shards
from flora.targets import lora_layers

log = logging.getLogger(__name__)

# On 2 cores a step of 2,048 tokens takes 10 % longer in passes of 512 and 5 % longer in passes of 1,024; clients of 128 tokens
# each are fastest in passes of 768 to 1,024, since the optimiser states of those in a pass exist. No GPU was measured.
FASTEST = {"cpu": 1024, "cuda": 16_384}
SHARE = 0.6                                                     # of the free memory, for what a pass keeps
# torch.OutOfMemoryError says the first, the CPU the next two; cuBLAS the last, where its handle or workspace found no room
NO_MEMORY = "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED"
BESIDE = 1.5                                                    # what lives beside what is kept: gradients, what is being computed

_per_token: WeakKeyDictionary[nn.Module, dict[bool, float]] = WeakKeyDictionary()


def available(device: torch.device) -> float:
    """Bytes that this process can still take on a device; infinity where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = float("inf")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            free = min(free, int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, StopIteration):                # another system, or no control group
        pass
    return max(free, 0.0)


class Budget:
    """tokens: what a pass of a model may hold; "auto": what is fastest on the device, once `measure` has seen that it fits.

    Sums depend on it in their last bits. So a run has one for all its rounds, which only ever shrinks, and a checkpoint holds its
    `state`. known: that of a run that goes on.
    """

    def __init__(self, model: nn.Module, tokens: int | Literal["auto"], known: Mapping[str, Any] | None = None):
        self.model, self.device, self._lockstep = model, device_of(model), holds_shards(model)
        if tokens == "auto" and self._lockstep:
            raise ConfigError('max_tokens_per_batch: expected a number for a sharded base, which all processes pass through in '
                              'lockstep; got "auto", which each would measure for itself. Set it, to 1024 say.')
        self._open = tokens == "auto"
        self.tokens = FASTEST.get(self.device.type, 4096) if tokens == "auto" else tokens
        self._room = math.inf
        if known:
            self.tokens, self._open, self._room = known["tokens"], known["open"], known["room"] or math.inf

    def state(self) -> dict[str, Any]:
        """{"tokens", "open": whether they are still to be measured, "room": bytes, None where no limit is known}."""
        return {"tokens": self.tokens, "open": self._open, "room": None if math.isinf(self._room) else self._room}

    def room(self) -> float:
        """Bytes that were free on the device, at the tightest moment at which this was asked."""
        self._room = min(self._room, available(self.device))
        return self._room

    def measure(self, forward: Callable[[], object], tokens: int, checkpointing: bool) -> None:
        """Bounds "auto" by the free memory. forward: a pass of so many tokens that somebody trains, gradients on; it is run once a
        model, and what it keeps for the backward pass is counted."""
        if not self._open:
            return
        known = _per_token.setdefault(self.model, {})
        if checkpointing not in known:
            known[checkpointing] = _kept(self.model, forward) / max(1, tokens)
        each, free = BESIDE * known[checkpointing], min(available(self.device), 1 << 60)
        fits = max(1, int(SHARE * free / max(1.0, each)))
        if fits < self.tokens:
            log.info("passes hold at most %d tokens: %.2f MB each, of %.1f GB free", fits, each / 1e6, free / 1e9)
        self.tokens, self._open = min(self.tokens, fits), False

    def halve(self, longest: int, error: Exception) -> None:
        """After an error of memory: passes of half as many tokens, of one row (longest: tokens) at least. Raises OutOfMemoryError,
        with what to do, where that is what they hold already or where other processes wait for the pass; any other error as it
        is."""
        if not re.search(NO_MEMORY, str(error)):
            raise error
        if self.tokens <= longest or self._lockstep:
            raise torch.OutOfMemoryError(
                f"{error}\nA pass holds at most {self.tokens} tokens here, and a row has {longest}. Shorten the rows (max_length), "
                "turn on gradient_checkpointing, lower ranks or depth, or let fewer clients train together.") from error
        self.tokens = max(longest, self.tokens // 2)
        log.warning("out of memory: passes hold at most %d tokens from now on, and the step is taken again", self.tokens)


def _kept(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward, beside the model's own tensors."""
    asleep = [t for layer in lora_layers(model).values() if (f := layer.frozen) is not None for t in (f.A, f.B, f.scale)]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *asleep)}
    kept: dict[int, int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        forward()
    return sum(kept.values())

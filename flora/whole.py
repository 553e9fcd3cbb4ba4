"""Full fine-tuning of one client: the base's own weights, in copies of its own that the model holds while it trains.

A pass cannot share weights, so clients come one after another; each begins from the base, never from what the one before it made of
a model that they share. The base's parameters are taken out and put back, not written to, so they come back to the bit.
"""
import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from flora.adapter import Adapter
from flora.errors import ConfigError
from flora.layer import is_linear, matrix
from flora.targets import linear_modules


class Whole:
    """The weights of linear modules as one client trains them; what a Loop needs of it is what it needs of Packed.

    modules: by layer name. A weight of 16 bits trains in fp32 beside it and is rounded after each step: AdamW's steps are smaller
    than its bits. parameters[0]: what the optimiser works on.
    """
    count = 1

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self._weights: list[Tensor] = [module.weight for module in modules.values()]
        self.parameters: list[dict[str, Tensor]] = [{
            f"{name}/weight": w.detach().float() if w.itemsize < 4 else w.detach()
            for name, w in zip(modules, self._weights, strict=True)}]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.parameters[0].values(), self._weights, strict=True)

    def route(self, rows: Sequence[int], keys: Tensor | None) -> None:
        """All rows are this client's."""

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.grad = None

    def take_gradients(self, k: int) -> None:
        for own, weight in self._pairs():
            own.grad = None if weight.grad is None else weight.grad.to(own.dtype)

    @torch.no_grad()
    def write(self, k: int) -> None:
        """Writes the weights of 16 bits from those that trained."""
        for own, weight in self._pairs():
            if own.dtype != weight.dtype:
                weight.copy_(own)

    def adapters(self, k: int) -> dict[str, Adapter]:
        return {}

    def weights(self, k: int) -> dict[str, Tensor]:
        """The weights (out, in) as they are now, in the base's dtype: copies on the CPU."""
        return {name: matrix(module).detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
                for name, module in self.modules.items()}


@contextlib.contextmanager
def own_weights(model: nn.Module, layers: Sequence[str]) -> Iterator[Whole]:
    """The model with copies of these layers' weights in their place, which alone train while the block runs; then as it was.

    Raises ConfigError for a layer whose weight is no plain floating-point matrix (quantised, or with an update beside it).
    """
    linears = linear_modules(model)
    modules = {name: linears[name] for name in layers}
    for name, module in modules.items():
        if not is_linear(module) or not isinstance(module.weight, nn.Parameter):
            raise ConfigError(f"{name}: expected a plain floating-point weight to fine-tune; got a {type(module).__name__}. Load "
                              "the model in floating point, leave the layer out of targets, or train adapters.")
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = {name: module.weight for name, module in modules.items()}
    try:
        model.requires_grad_(False)
        for module in modules.values():
            module.weight = nn.Parameter(module.weight.detach().clone())
        yield Whole(modules)
    finally:
        for name, module in modules.items():
            module.weight = before[name]
        for parameter in required:
            parameter.requires_grad_(True)

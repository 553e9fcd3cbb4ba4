"""Attention within each sequence of a line of sequences: no mask of the line exists, and a NaN of one cannot reach another.

Sequences of one length that lie together go through transformers' own `sdpa` at once, as a batch. Where lengths differ that is a
call for every run of equal lengths, dozens a layer; on a GPU in 16 bits PyTorch's flash attention over sequences of any lengths
(torch.nn.attention.varlen) takes the whole line in one. Whether it is there and right is tried once for each GPU, on two sequences.
"""
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flora.segments import sent_to

log = logging.getLogger(__name__)

REFUSED = ("dropout", "softcap", "cache")                 # options that flash attention over a line does not know
Flash = Callable[[Tensor, Tensor, Tensor, "Line", float | None, int | None], Tensor]


class Line:
    """Where the sequences of a line end. lengths: tokens of each; runs: (length, how many of it in a row)."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self.runs = [(length, len(list(same))) for length, same in groupby(self.lengths)]
        self._offsets: Tensor | None = None

    def offsets(self, device: torch.device) -> Tensor:
        """int32 (sequences + 1,) on a device: where each begins. Copied there once, for all layers."""
        if self._offsets is None or self._offsets.device != device:
            self._offsets = sent_to(device, torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32))
        return self._offsets


def attend(line: Line, module: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
    """query (1, heads, tokens, size), key and value with as many heads or a divisor of them; gives (1, tokens, heads, size).
    options: what transformers hands on: scaling, dropout, sliding_window, ..."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options, scaling = dict(options), options.get("scaling")
    window = options.pop("sliding_window", None)
    if len(line.runs) > 1 and (flash := _flash_for(module, query, key, value, options)) is not None:
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return flash(q, k, v, line, scaling, window)[None]
    if query.is_cuda and query.itemsize > 2 and query.shape[1] != key.shape[1]:     # else all scores exist: only flash takes groups
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    sizes, out = [length * count for length, count in line.runs], []
    for (length, count), q, k, v in zip(line.runs, *(t.split(sizes, dim=2) for t in (query, key, value)), strict=True):
        mask = None
        if window is not None and length > window:
            order = torch.arange(length, device=q.device)
            far = order[:, None] - order
            mask = ((far >= 0) & (far < window))[None, None]
        q, k, v = (t[0].unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v))
        y, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
        out.append(y.reshape(1, count * length, *y.shape[2:]))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _flash_for(module: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Flash | None:
    """Flash attention over a line, where it can compute this."""
    causal = options.get("is_causal")
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or any(options.get(n) for n in REFUSED):
        return None
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return None
    size = query.shape[-1]
    if size % 8 or size > 256 or not size == key.shape[-1] == value.shape[-1]:
        return None
    return flash_on(query.device)


@functools.cache
def flash_on(device: torch.device) -> Flash | None:
    """Flash attention over sequences of any lengths on this GPU, causal: (q (tokens, heads, size), k, v, line, scale, window) gives
    q's shape. None where this PyTorch has none for it, or another answer than sdpa."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        run = _adapted(varlen_attn)
        with torch.inference_mode(False):
            return run if _agrees(run, device) else None
    except Exception as error:                                  # whatever a build or a card says: there is another way
        log.warning("attention takes a call for every length in a pass on %s: %s", device, error)
        return None


def _adapted(varlen_attn: Callable[..., Any]) -> Flash:
    """torch's function, whose signature differs between 2.10 and 2.13."""
    takes = inspect.signature(varlen_attn).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, line: Line, scale: float | None, window: int | None) -> Tensor:
        options: dict[str, Any] = {} if "window_size" in takes else {"is_causal": True}
        if "window_size" in takes:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        if "enable_gqa" in takes:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if "scale" in takes:
            options["scale"] = scale
        elif scale is not None:
            q = q * (scale * q.shape[-1] ** 0.5)
        offsets, longest = line.offsets(q.device), max(line.lengths)
        out: Tensor = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        return out

    return run


def _agrees(run: Flash, device: torch.device) -> bool:
    """Whether two sequences give what each gives alone, and so do their gradients, with fewer heads of keys and another scale."""
    line, draw = Line([19, 5]), torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(24, heads, 16, generator=draw).to(device, torch.bfloat16).requires_grad_() for heads in (4, 2, 2, 4))

    def alone(*some: Tensor) -> Tensor:
        own = [t.float().repeat_interleave(4 // t.shape[1], 1).transpose(0, 1)[None] for t in some]
        y = torch.nn.functional.scaled_dot_product_attention(own[0], own[1], own[2], is_causal=True, scale=0.3)
        return y[0].transpose(0, 1)

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        got, expected = run(q, k, v, line, 0.3, None), torch.cat(list(map(alone, *(t.split(line.lengths) for t in (q, k, v)))))
        found = (got, *torch.autograd.grad(got, (q, k, v), dy))
        pairs = zip(found, (expected, *torch.autograd.grad(expected, (q, k, v), dy.float())), strict=True)
        good = all(float((a - b).detach().norm()) <= 0.02 * float(b.detach().norm()) for a, b in pairs)
    if not good:
        log.warning("attention takes a call for every length in a pass on %s: torch.nn.attention.varlen gives another one", device)
    return good

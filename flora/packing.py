"""Sequences of different lengths in one line of a model, without padding, each attending to itself alone.

A model of transformers asks a named function for its attention. Ours (attention.py) cuts the line at the sequences' ends: nothing
is spent between sequences. Everything else in such a model works on one token at a time and needs only the positions. Whether a
given model is like that is not looked up but tried, on eight tokens, before it is relied on; and so is whether its logits are its
output embedding times its last hidden states, which lets a loss be taken in chunks (losses.py).
"""
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flora.attention import Line, attend
from flora.layer import computes_itself, device_for, is_linear
from flora.sharded import holds_shards

log = logging.getLogger(__name__)

NAME = "flora_packed"
KNOWN = {"full_attention", "sliding_attention"}

_lines: dict[int, Line] = {}                                    # that a model is in, by the id of its config


@dataclass(frozen=True)
class Traits:
    """What a model was seen to do. packs: sequences in one line give what they give alone; head: its logits are the output
    embedding times the last hidden states; why: what stands against packing."""
    packs: bool
    head: bool
    why: str = ""


_traits: WeakKeyDictionary[nn.Module, Traits] = WeakKeyDictionary()


def device_of(model: nn.Module) -> torch.device:
    return device_for(model)


def is_plain(head: nn.Module) -> bool:
    """Whether a module is x Wᵀ + bias and nothing else: its weight a plain matrix, no hooks, no forward of its own."""
    return isinstance(head, nn.Linear) and is_linear(head) and not computes_itself(head)


def traits_of(model: nn.Module) -> Traits:
    """What this model allows, tried once. Says in the log why sequences are padded, where they are."""
    if model not in _traits:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                _traits[model] = _try(model)
        finally:
            model.train(was_training)
        if not _traits[model].packs:
            log.warning("sequences are padded, not packed: %s", _traits[model].why)
    return _traits[model]


def _try(model: nn.Module) -> Traits:
    if not all(hasattr(model, name) for name in ("config", "base_model", "get_output_embeddings")):
        return Traits(False, False, f"{type(model).__name__} is not a model of transformers")
    if holds_shards(model):                                     # parts of it cannot be called by themselves
        return Traits(False, False, "its weights are sharded over several processes")
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=device_of(model)) * 7 + 3) % size
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2], device=ids.device)
    padded = torch.zeros_like(mask).masked_scatter(mask.bool(), ids)
    head, why = False, ""
    try:
        expected = model(input_ids=padded, attention_mask=mask).logits[mask.bool()]
        hidden = model.base_model(input_ids=padded, attention_mask=mask)[0][mask.bool()]
        output = model.get_output_embeddings()
        head = is_plain(output) and _close(output(hidden), expected)
    except Exception as error:                                  # another call, other outputs: whatever it is, it is not that
        return Traits(False, False, f"{type(model).__name__} cannot be called so: {error}")
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - KNOWN
    if layers:
        return Traits(False, head, f"{type(model).__name__} has layers of the kind {', '.join(sorted(layers))}")
    try:
        with packable(model):
            positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=ids.device)
            with line(model, [5, 3]):
                got = model(input_ids=ids[None], position_ids=positions).logits[0]
        why = "" if _close(got, expected) else f"in {type(model).__name__} sequences in one line do not give what they give alone"
    except Exception as error:                                  # a model may do anything with an attention it does not know
        why = f"{type(model).__name__} does not take its attention from transformers' interface: {error}"
    return Traits(not why, head, why)


def _close(got: Tensor, expected: Tensor) -> bool:
    """The same but for rounding: one leak between two sequences of a few tokens is a thousand times as large."""
    if got.shape != expected.shape:
        return False
    return float((got - expected).norm()) <= 64 * torch.finfo(expected.dtype).eps * float(expected.norm())


def _configs(model: nn.Module) -> list[object]:
    """Every config that a module of the model reads, each once."""
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


@contextlib.contextmanager
def packable(model: nn.Module) -> Iterator[None]:
    """While the block runs the model's attention is ours, which needs `line` around every forward and backward pass."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    configs = [config for config in _configs(model) if getattr(config, "_attn_implementation", None)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@contextlib.contextmanager
def line(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Says where the sequences of the model's one line end: so many tokens each. Around the backward pass too, which may compute
    a checkpointed layer again."""
    keys = [id(config) for config in _configs(model)]
    try:
        _lines.update(dict.fromkeys(keys, Line(lengths)))
        yield
    finally:
        for key in keys:
            _lines.pop(key, None)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            **options: Any) -> tuple[Tensor, None]:
    """Attention within each sequence of the model's line, as transformers asks for it. attention_mask: not read, there is none."""
    return attend(_lines[id(module.config)], module, query, key, value, options), None

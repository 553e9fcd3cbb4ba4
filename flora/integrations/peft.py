"""flora for those who stay with PEFT: faster layers, exact aggregation and files, without flora's engine.

A PEFT adapter has one scaling a layer, alpha / r, so what a strategy gives (a stack of weighted clients, what is to be merged
beside what is to go on training) becomes ONE adapter: merge and start are stacked, their scales folded into B in fp32 where they
differ, ranks and alphas that differ by layer written as patterns. Its ΔW is the strategy's result on the base that the clients
trained on; nothing was merged into that.
"""
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from flora.adapter import Adapter, all_layers, stack
from flora.errors import AdapterError, StrategyError
from flora.formats import PREFIX, adapters_of, check_plain, peft_form
from flora.formats import load_peft as load
from flora.formats import save_peft as save
from flora.formats import save_portable as portable
from flora.integrations.accelerated import AcceleratedLinear, accelerate, fallbacks, restore
from flora.messages import Update
from flora.strategies import Strategy, strategy_named
from flora.strategies import aggregate as aggregate_updates

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["accelerate", "restore", "fallbacks", "AcceleratedLinear", "aggregate", "load", "save", "portable"]

_KEPT = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "lora_dropout")


def aggregate(state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float], configs: object,
              strategy: str = "flora") -> tuple[dict[str, Tensor], "LoraConfig"]:
    """One PEFT adapter whose ΔW is what the strategy makes of the clients': (state_dict, LoraConfig). A pure function.

    state_dicts: as get_peft_model_state_dict or adapter_model.safetensors has them, of any ranks, with the adapter's name in the
    keys or without. weights: numbers >= 0, p_k = w_k / Σ w (numbers of examples, say); who has 0 is left out. configs: a LoraConfig
    (or its dict) for all, or one a client; each says its client's r, alpha, patterns and rsLoRA.

    flora: ΔW = Σ p_k s_k B_k A_k exactly, of rank Σ r_k; to go on at a smaller rank, flora.compress what load gives. A layer that
    some clients lack counts as no change for the exact strategies; the averages of factors refuse it. Keys come layer by layer in
    the first client's order, on its device. The configuration has the first one's task, base model, dropout and fan_in_fan_out.

    Raises AdapterError for keys, shapes, ranks or configurations that are not plain LoRA's; StrategyError for weights, layers or
    ranks that the strategy cannot combine, and for strategies that keep factors at the client or average whole weights.
    """
    rule = _usable(strategy)
    clients, configs = list(state_dicts), _each(configs, len(state_dicts))
    shares = _weights(weights, len(clients))
    sets = [_read(tensors, config, f"client number {k}") for k, (tensors, config) in enumerate(zip(clients, configs, strict=True))]
    _refuse_other_layers(sets, rule)
    # any positive weight: what is combined here travels nowhere, so it need not be a count
    updates = [Update(adapters, cast(int, weight), client=f"number {k}")
               for k, (adapters, weight) in enumerate(zip(sets, shares, strict=True)) if weight > 0]
    version = _version(updates)
    made = aggregate_updates([Update(u.adapters, u.num_examples, client=u.client, base_version=version) for u in updates], strategy)
    parts = [part for part in (made.merge, made.start) if part]
    whole = {layer: _together([part[layer] for part in parts if layer in part], layer, updates)
             for layer in all_layers([u.adapters for u in updates])}
    prefix = PREFIX if all(key.startswith(PREFIX) for key in clients[0]) else ""
    tensors, fields = peft_form(whole, prefix)
    return {key: t.to(next(iter(clients[0].values())).device) for key, t in tensors.items()}, _config(fields, configs[0])


def _usable(strategy: str) -> Strategy:
    """The strategy, if one adapter for all can hold what it gives. Raises StrategyError."""
    rule = strategy_named(strategy)
    if rule.home or rule.dense:
        why = "averages whole weights, of which an adapter has none" if rule.dense else \
            f"keeps {' and '.join(rule.home)} at every client, so there is no one adapter for all"
        raise StrategyError(f"expected a strategy whose result is one adapter; {strategy} {why}. Use flora.aggregate on Updates "
                            "for it, or another strategy here, such as flora.")
    return rule


def _each(configs: object, count: int) -> list[dict[str, Any]]:
    """One configuration a client, as a dict."""
    if count == 0:
        raise StrategyError("expected at least one state dict to aggregate; got none. Did every client of the round fail?")
    many: list[Any] = list(configs) if isinstance(configs, (list, tuple)) else [configs] * count
    if len(many) != count:
        raise StrategyError(f"expected one configuration, or one for each of {count} state dicts; got {len(many)}")
    return [config.to_dict() if hasattr(config, "to_dict") else config for config in many]


def _weights(weights: Sequence[float], count: int) -> list[float]:
    """The weights as floats. Raises StrategyError unless they are finite, not negative, and have a positive sum."""
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise StrategyError(f"expected a number a client as weights; got {weights!r}") from error
    if len(values) != count:
        raise StrategyError(f"expected one weight for each of {count} state dicts; got {len(values)}")
    if not all(0.0 <= value < math.inf for value in values) or not 0.0 < sum(values) < math.inf:
        raise StrategyError(f"expected finite weights >= 0 with a positive sum; got {values}. Give every client its number of "
                            "examples, or 1 each.")
    return values


def _read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], who: str) -> dict[str, Adapter]:
    """A client's adapters. Raises AdapterError, which names the client."""
    check_plain(config, who)
    if not tensors:
        raise AdapterError(f"{who}: expected lora_A and lora_B weights; got an empty state dict")
    return adapters_of(tensors, config, who)


def _refuse_other_layers(sets: Sequence[Mapping[str, Adapter]], rule: Strategy) -> None:
    """Raises StrategyError where a client lacks a layer and the strategy does not count that as no change."""
    absent = inspect.signature(rule.aggregate).parameters.get("absent")
    layers = all_layers(sets)
    lacking = {k: [layer for layer in layers if layer not in adapters] for k, adapters in enumerate(sets)}
    if (absent is None or absent.default != "zero") and any(lacking.values()):
        said = "; ".join(f"client number {k} lacks {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
                         for k, names in lacking.items() if names)
        raise StrategyError(f"expected the same layers of every client for {rule.name}, which averages; {said}. Use flora, which "
                            "counts a missing layer as no change.")


def _version(updates: Sequence[Update]) -> int:
    """0, or 1 where B is every client's and A is not: which factor trained, for a strategy that trains them in turn."""
    def shared(factor: str) -> bool:
        return all(torch.equal(getattr(u.adapters[layer], factor), getattr(a, factor)) for u in updates[1:]
                   for layer, a in updates[0].adapters.items() if layer in u.adapters)

    return int(shared("B") and not shared("A"))


def _together(parts: Sequence[Adapter], layer: str, updates: Sequence[Update]) -> Adapter:
    """Merge and start of a layer as one. A layer of zeros, which starts leave out, keeps its place: the first A there is, B = 0."""
    if parts:
        return stack(parts) if len(parts) > 1 else parts[0]
    a = next(u.adapters[layer] for u in updates if layer in u.adapters)
    return Adapter(a.A, torch.zeros_like(a.B), a.scale)


def _config(fields: Mapping[str, Any], first: Mapping[str, Any]) -> "LoraConfig":
    """The configuration of the result, ready to train on."""
    from peft import LoraConfig

    fields = {**fields, **{name: first[name] for name in _KEPT if first.get(name) is not None}, "inference_mode": False}
    return LoraConfig(**{name: value for name, value in fields.items() if name != "peft_type"})

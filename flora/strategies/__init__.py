"""The aggregation rules by name, and `aggregate`, which applies one to updates. Each is a few lines of the adapter algebra."""
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.strategies.average import CENTRALIZED, FEDIT, STANDALONE, ZEROPAD
from flora.strategies.base import Strategy
from flora.strategies.exact import FLORA

__all__ = ["STRATEGIES", "Strategy", "aggregate", "check_update", "strategy_named"]

STRATEGIES: dict[str, Strategy] = {s.name: s for s in (FLORA, FEDIT, ZEROPAD, CENTRALIZED, STANDALONE)}


def strategy_named(name: str) -> Strategy:
    """The strategy of this name. Raises StrategyError with the nearest name where there is none."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(str(name), STRATEGIES, 1)
        raise StrategyError(f"expected a strategy out of {', '.join(STRATEGIES)}; got {name!r}"
                            + (f". Did you mean {near[0]!r}?" if near else ""))
    return STRATEGIES[name]


def _check(updates: Sequence[Update]) -> None:
    """At least one update, all of one base version, examples positive, shapes agreeing by layer, numbers finite."""
    if not updates:
        raise StrategyError("expected at least one update to aggregate; got none. Did every client of the round fail?")
    versions = {u.base_version for u in updates}
    if len(versions) != 1:
        raise StrategyError(f"expected updates trained on one version of the base; got versions {sorted(versions)}. Leave out "
                            "the clients that are behind.")
    shapes: dict[str, tuple[int, int]] = {}
    for number, update in enumerate(updates):
        for layer, a in update.adapters.items():
            shapes.setdefault(layer, a.shape)
        check_update(update, update.client or f"number {number}", shapes)


def check_update(update: Update, who: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises StrategyError unless the update has examples, and finite adapters for layers of these (out, in)."""
    if not update.num_examples > 0:
        raise StrategyError(f"client {who}: expected num_examples of at least 1; got {update.num_examples}")
    for layer, a in update.adapters.items():
        if layer not in shapes:
            raise StrategyError(f"client {who}: expected adapters for layers of this run; got {layer}")
        if tuple(shapes[layer]) != a.shape:
            raise StrategyError(f"client {who}, {layer}: expected an adapter for (out, in) = {tuple(shapes[layer])} as the others "
                                f"sent; got {a.shape}")
        if not all(bool(torch.isfinite(t).all()) for t in (a.A, a.B, a.scale)):
            raise StrategyError(f"client {who}, {layer}: expected finite numbers; got NaN or infinity. Leave the client out.")


def aggregate(updates: Sequence[Update], strategy: str = "flora", **options: object) -> Broadcast:
    """What the server sends next: the strategy's rule applied to the updates of a round. A pure function; order is kept.

    options: those of the strategy's function: weights="examples" | "uniform" (p_k = n_k / Σ n, or 1 / K) and
    absent="zero" | "renormalise" (a layer that some clients lack). The result's version is the updates' base_version + 1.
    Raises StrategyError for updates that cannot be combined so, an unknown strategy or option.
    """
    rule = strategy_named(strategy)
    known = list(inspect.signature(rule.aggregate).parameters)[1:]
    for option in options:
        if option not in known:
            raise StrategyError(f"{strategy} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    _check(updates)
    return replace(rule.aggregate(updates, **options), version=updates[0].base_version + 1)

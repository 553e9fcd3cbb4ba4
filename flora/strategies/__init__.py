"""The aggregation rules by name, and `aggregate`, which applies one to updates. Each is a few lines of the adapter algebra."""
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from flora.adapter import Adapter, all_layers
from flora.errors import MessageError, StrategyError
from flora.messages import Broadcast, Update
from flora.strategies.average import CENTRALIZED, FEDIT, FEDSA, HETLORA, STANDALONE, ZEROPAD
from flora.strategies.base import Strategy, come_home, leave_home, one_rank
from flora.strategies.exact import FEDEX, FLORA
from flora.strategies.frozen import FEDSB, FEDSVD, FFA, ROLORA
from flora.strategies.full import FULL
from flora.strategies.spectral import FLEXLORA, FLORIST, RAFLORA
from flora.wire import largest

__all__ = ["STRATEGIES", "Strategy", "aggregate", "check_update", "come_home", "leave_home", "strategy_named"]

LARGEST = 1e12                                                  # in a factor, a scale or a weight: A, B and s multiply

STRATEGIES: dict[str, Strategy] = {s.name: s for s in (
    FLORA, FEDIT, ZEROPAD, HETLORA, FLEXLORA, FLORIST, FFA, ROLORA, FEDEX, FEDSA, FEDSVD, FEDSB, RAFLORA, CENTRALIZED, STANDALONE,
    FULL)}


def strategy_named(name: str) -> Strategy:
    """The strategy of this name. Raises StrategyError with the nearest name where there is none."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(str(name), STRATEGIES, 1)
        raise StrategyError(f"expected a strategy out of {', '.join(STRATEGIES)}; got {name!r}"
                            + (f". Did you mean {near[0]!r}?" if near else ""))
    return STRATEGIES[name]


def _check(updates: Sequence[Update], rule: Strategy) -> None:
    """At least one update, all of one base version, examples positive, shapes agreeing by layer, numbers finite, ranks as the rule
    takes them."""
    if not updates:
        raise StrategyError("expected at least one update to aggregate; got none. Did every client of the round fail?")
    versions = {u.base_version for u in updates}
    if len(versions) != 1:
        raise StrategyError(f"expected updates trained on one version of the base; got versions {sorted(versions)}. Leave out "
                            "the clients that are behind.")
    shapes: dict[str, tuple[int, ...]] = {}
    for number, update in enumerate(updates):
        who = update.client or f"number {number}"
        held: dict[str, Adapter | Tensor] = {**update.adapters, **(update.base or {})}
        for layer, one in held.items():
            shapes.setdefault(layer, tuple(one.shape))
        check_update(update, who, shapes)
    _check_kind(updates, rule)
    if not shapes:
        raise StrategyError("expected adapters for at least one layer; got updates without any. Did the clients train any layer?")
    for layer in [] if rule.mixed_ranks else all_layers([u.adapters for u in updates]):
        one_rank([u.adapters[layer].rank for u in updates if layer in u.adapters])


def _check_kind(updates: Sequence[Update], rule: Strategy) -> None:
    """Raises StrategyError for weights where the rule takes adapters, or the other way round."""
    for number, update in enumerate(updates):
        if (update.base is not None) != rule.dense:
            have, wants = ("weights", "adapters") if update.base is not None else ("adapters", "weights (Update.base)")
            raise StrategyError(f"client {update.client or f'number {number}'}: expected {wants} for strategy {rule.name}; got "
                                f"{have}. Train what the broadcast says (Broadcast.train).")


def check_update(update: Update, who: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises StrategyError, which names `who`, unless the update has examples and finite adapters (or weights) for layers of these
    shapes, (out, in) by layer name."""
    if not update.num_examples > 0:
        raise StrategyError(f"client {who}: expected num_examples of at least 1; got {update.num_examples}. Leave the client out.")
    parts = {layer: (a.A, a.B, a.scale) for layer, a in update.adapters.items()}
    for layer, tensors in {**parts, **{layer: (w,) for layer, w in (update.base or {}).items()}}.items():
        if layer not in shapes:
            raise StrategyError(f"client {who}: expected adapters for layers of this run; got {layer}")
        have = tuple(tensors[0].shape) if len(tensors) == 1 else update.adapters[layer].shape
        if tuple(shapes[layer]) != have:
            raise StrategyError(f"client {who}, {layer}: expected an adapter for (out, in) = {tuple(shapes[layer])} as the others "
                                f"sent; got {have}")
        try:
            top = max(largest(layer, t) for t in tensors)
        except MessageError:
            raise StrategyError(f"client {who}, {layer}: expected finite numbers; got NaN or infinity. Leave the client out."
                                ) from None
        if top > LARGEST:
            raise StrategyError(f"client {who}, {layer}: expected numbers up to {LARGEST:g}, whose products fp32 can hold; got "
                                f"{top:.3g}. Leave the client out.")


def aggregate(updates: Sequence[Update], strategy: str = "flora", **options: object) -> Broadcast:
    """What the server sends next: the strategy's rule applied to the updates of a round. A pure function; order is kept.

    options: those of the strategy's function (Strategy.options). Most have weights="examples" | "uniform" | "tokens" or a fixed
    factor (p_k = n_k / Σ n, 1 / K, or this), absent="zero" | "renormalise" (a layer that some clients lack), server_lr, and sent:
    the start that these updates were trained from. The result's version is the updates' base_version + 1.
    Raises StrategyError for updates that cannot be combined so, an unknown strategy or option.
    """
    rule = strategy_named(strategy)
    for option in options:
        if option not in rule.options:
            raise StrategyError(f"{strategy} has no option {option!r}; it has: {', '.join(rule.options) or 'none'}")
    _check(updates, rule)
    return replace(rule.aggregate(updates, **options), version=updates[0].base_version + 1)

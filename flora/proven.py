"""What differential privacy is proven for, and why all else is refused: a guarantee that does not hold is worse than none."""
from collections.abc import Collection
from typing import Literal

from flora.errors import StrategyError
from flora.strategies import strategy_named

Level = Literal["client", "example"]
PROVEN = ("flora", "fedit", "zeropad", "ffa", "rolora", "fedsvd", "fedsb")
EXAMPLE_PROVEN = ("ffa", "fedsvd")

RULES = {
    "hetlora": "it weighs clients by the norm of what they send, which is no sum of clipped parts, and they prune their own ranks",
    "flexlora": "its release is the SVD of a weighted sum of factors for which no noisy release is worked out here",
    "florist": "the rank it sends is chosen by the clients' singular values",
    "fedex": "it releases averages of factors and the residual of the stack, two functions of the same data, which share no noise",
    "raflora": "it divides by how many of the sampled clients have a rank, so the sum has no fixed denominator",
    "fedsa": "what a run gives are the clients' own B's, which nothing protects",
    "standalone": "it releases nothing, and the clients' own models, which are its result, are not protected",
    "centralized": "it pools everybody's rows in one client, so there is no client to protect",
    "full": "it averages whole weights, for which no clip is worked out here",
}
FEATURES = {
    "groups": "a group answers for several clients, so a clipped answer is no clipped client",
    "adalora": "the ranks that a client keeps are chosen by its data, and are no part of the release that gets noise",
    "rank_decay": "the ranks that a client keeps are chosen by its data, and are no part of the release that gets noise",
    "filter": "whether an update is left out depends on the others, so one client can change more than its own part",
    "late": "an update of an older round counts in a round that its client was not sampled for",
    "stream": "a stream sums by its own weights and does not clip",
    "start": "warm and shared starts of flora: what is sent there is not worked out under noise",
    "server_learning_rate": "a step of another length than 1 is not worked out under noise",
    "absent": "a mean over those who have a layer has a denominator that depends on who was sampled",
    "communication_budget": "a run that stops by the bytes of who was drawn tells who was",
    "over_sampling": "who is among the first is no independent draw of each client",
    "min_clients": "whether a round is released would depend on who answers",
    "round_deadline": "who is late would depend on how much a client has to train on",
    "mixed_alpha": "factors of clients with different alpha / r move by different amounts at the same norm",
}
EXAMPLE_FEATURES = {
    "groups": "inner rounds use an example more often than is counted",
    "adalora": "which ranks it keeps depends on gradients that got no noise",
    "rank_decay": "ranks that a client prunes are no part of what gets noise",
}


def refuse_unproven(strategy: str, weighting: str | float = "uniform", features: Collection[str] = (),
                    level: Level = "client") -> None:
    """Raises StrategyError, which says what and why, unless the guarantee of this level is proven for a run with this strategy and
    weighting.

    features: those of FEATURES that the run uses; one that is not known is refused too. At level example what the server does
    works on what clients have already noised, so the rest of FEATURES may be used. Optimiser state that stays on clients needs no
    mention: it is a function of that client's own data and of what was released, as its update is.
    """
    known, proven = strategy_named(strategy).name, PROVEN if level == "client" else EXAMPLE_PROVEN
    if known not in proven:
        why = RULES[known] if level == "client" else "only rules under which B alone trains, beside a fixed A, are worked out"
        raise StrategyError(f"privacy.level {level}: expected a strategy for which the guarantee is proven ({', '.join(proven)}); "
                            f"got {known}: {why}. Use one of these, or leave privacy out.")
    if weighting != "uniform":
        raise StrategyError(f'privacy: expected weighting "uniform"; got {weighting!r}: how much a client has is private, and '
                            "would change how much it counts. Set weighting: uniform.")
    reasons = FEATURES if level == "client" else EXAMPLE_FEATURES
    for feature in features:
        if feature in reasons or feature not in FEATURES:
            why = reasons.get(feature, "nobody has looked at what it does to the guarantee")
            raise StrategyError(f"privacy: expected a run without {feature}: {why}. Leave {feature} or privacy out.")

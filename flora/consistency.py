"""Settings that each are right and do not go together."""
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flora.config import RunConfig

EVALUATIONS = r"labels|answers|lm_eval:.+|mt_bench:.+"


def conflicts(config: "RunConfig") -> Iterator[str]:
    """What these settings ask for that does not go together, each with its remedy."""
    rules = config.partition.model_dump(exclude={"label", "equal_sizes"}, exclude_defaults=True)
    if len(rules) > 1:
        yield f"partition: expected one of by, iid, dirichlet_alpha, shards; got {', '.join(rules)}"
    if config.partition.equal_sizes and config.partition.dirichlet_alpha is None:
        yield "partition.equal_sizes: expected dirichlet_alpha with it; got none. Leave equal_sizes out"
    if config.max_steps is not None and config.num_train_epochs is not None:
        yield "expected max_steps or num_train_epochs; got both. Leave one out"
    if config.merge_into == "adapter" and (config.merge_residual or config.merge_rounding != "nearest"):
        yield "merge_into adapter rounds no weight: leave out merge_residual and merge_rounding"
    if config.merge_into == "base" and (config.merge_rank is not None or config.merge_tol):
        yield "merge_rank and merge_tol compress what merge_into: adapter keeps; add it, or leave them out"
    if config.fleet and sum(kind.count for kind in config.fleet) != config.num_clients:
        yield (f"fleet: expected as many devices as num_clients ({config.num_clients}); got "
               f"{sum(kind.count for kind in config.fleet)}")
    if config.round_deadline is not None and not config.fleet:
        yield "round_deadline is of simulated time: give a fleet, or leave it out"
    if config.groups and config.groups.count > config.num_clients:
        yield f"groups: expected at most num_clients ({config.num_clients}) groups; got {config.groups.count}"
    if config.groups and config.groups.choose and config.round_deadline is None and config.groups.bytes_mb is None:
        yield "groups.choose: expected round_deadline or groups.bytes_mb to choose within; got neither"
    if config.downlink_tol and config.downlink not in ("threshold", "auto"):
        yield f"downlink_tol is for downlink threshold or auto; got {config.downlink}. Leave one out"
    if config.adalora_keep is not None and not config.adalora:
        yield "adalora_keep is of adalora: add adalora: true, or leave it out"
    if config.downlink in ("dense", "auto") and (config.merge_residual or config.merge_rounding != "nearest"):
        yield (f"downlink {config.downlink} may send weights, rounded to nearest and without what that leaves: "
               "leave out merge_residual and merge_rounding, or take another downlink")
    if config.downlink == "dense" and config.merge_into == "adapter":
        yield "downlink dense sends the weights that merge_into: adapter leaves alone: leave one out"
    if config.downlink == "threshold" and not config.downlink_tol:
        yield "downlink threshold: expected downlink_tol, the relative error that it may make, such as 1e-3"
    unknown = [] if config.evaluate == "auto" else [e for e in config.evaluate if not re.fullmatch(EVALUATIONS, e)]
    if unknown:
        yield f"evaluate: expected labels, answers, lm_eval:FOLDER or mt_bench:FILE; got {', '.join(unknown)}"
    if "none" in config.report_to and len(config.report_to) > 1:
        yield f"report_to: expected tensorboard, wandb, both, or none alone; got {', '.join(config.report_to)}"
    for name in ("lora_r", "lora_alpha"):
        value = getattr(config, name)
        if isinstance(value, list) and len(value) not in (1, config.num_clients):
            yield f"{name}: expected one number, or one a client ({config.num_clients}); got {len(value)}"
    if config.over_sampling > 1 and (not config.fleet or config.groups):
        yield "over_sampling ends a round with whom a fleet's clock has first: give a fleet, without groups, or leave it out"
    late = config.round_deadline is not None or config.over_sampling > 1
    if config.late == "next" and (not late or config.groups):
        yield "late: expected round_deadline or over_sampling with late: next, and no groups, or nobody is late; leave it out"
    if config.over_sampling > 1 and config.fraction_train == 1:
        yield "over_sampling: expected fraction_train under 1 with it, or there is nobody else to ask; leave one out"
    if config.late == "drop" and config.staleness_weight != 0.5:
        yield "staleness_weight is of late: next: add it, or leave staleness_weight out"
    if config.robust is None and (config.robust_bound is not None or config.robust_share != 0.2):
        yield "robust_share and robust_bound are of robust: add robust, or leave them out"

"""From a config to what a run needs: the model, and every client's rows as token ids, with their held-out splits."""
import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flora.client import LocalClient, TrainConfig
from flora.config import RunConfig
from flora.data import Partition, Splits, epoch_order, load_model, load_rows, load_tokenizer, partition, split, tokenize_rows
from flora.downlink import Downlink
from flora.engines import guards
from flora.engines.scores import Scores, scores_of
from flora.errors import ConfigError, DataError
from flora.group import Group, leaves
from flora.grouping import Histograms, histograms, token_histograms
from flora.messages import Broadcast, Update
from flora.server import Server, first_broadcast
from flora.strategies import STRATEGIES, Strategy, leave_home, strategy_named
from flora.versions import MergeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flora.distributed import Team

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
Rows = list[dict[str, list[int]]]
POOLED = "everyone"


@dataclass(frozen=True)
class Job:
    """What a run works on. eval_rows: held-out rows by client; server_rows: those of the server; histograms: of the clients'
    training rows, where there are groups; team: the processes that share the training out (processes.py)."""
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    clients: list[LocalClient]
    eval_rows: Mapping[str, Rows]
    server_rows: Rows
    train_config: TrainConfig
    eval_batch_size: int
    merge_config: MergeConfig
    scores: Scores
    histograms: Histograms
    team: "Team | None" = None


OPTIONS = {"start": "start", "server_learning_rate": "server_lr", "absent": "absent", "mixed_alpha": "mixed_alpha",
           "threshold": "threshold"}
DENSE = ("downlink", "merge_into", "merge_residual", "merge_rounding", "lora_dropout", "adapter_dtype")     # of no use to weights


def check(config: RunConfig) -> None:
    """Raises ConfigError for keys that this strategy has no use for, naming the strategies that have; StrategyError for a strategy
    that there is not."""
    rule = strategy_named(config.strategy)

    def refuse(key: str, able: Callable[[Strategy], bool]) -> None:
        names = [name for name, other in STRATEGIES.items() if able(other)]
        raise ConfigError(f"{key}: expected strategy {' or '.join(names)} with it; got {config.strategy}. Leave {key} out, or "
                          "change the strategy.")

    for key, option in OPTIONS.items():
        if getattr(config, key) is not None and option not in rule.options:
            refuse(key, lambda other, option=option: option in other.options)
    if config.weighting != "examples" and "weights" not in rule.options:
        refuse("weighting", lambda other: "weights" in other.options)
    for key in ("rank_decay", "rank_penalty"):
        if getattr(config, key) is not None and not rule.prunes:
            refuse(key, lambda other: other.prunes)
    if rule.dense:
        given = [key for key in DENSE if getattr(config, key) != type(config).model_fields[key].default]
        if given or isinstance(config.weighting, float):
            raise ConfigError(f"{given[0] if given else 'weighting'}: expected a strategy of adapters with it; got "
                              f"{config.strategy}, which trains and averages the weights themselves. Leave it out, or change the "
                              "strategy.")
    if config.adapter_dtype != "float32" and rule.begin({}, [1], 0).train == "core":
        raise ConfigError(f"adapter_dtype: expected float32 with {config.strategy}, whose core is what travels; got "
                          f"{config.adapter_dtype}. Leave it out.")
    guards.check(config)
    if config.adalora and (not rule.mixed_ranks or rule.dense or rule.prunes):
        refuse("adalora", lambda other: other.mixed_ranks and not other.dense and not other.prunes)


def rehearse(config: RunConfig) -> None:
    """Everything that `check` and the strategy refuse of this config, before a row is read: a server of its ranks and alphas
    aggregates once. Raises ConfigError, StrategyError."""
    check(config)
    sizes = enumerate(zip(config.ranks(), config.alphas(), strict=True))
    clients: list[LocalClient | Group] = [LocalClient(f"client-{k}", [{}], rank, alpha) for k, (rank, alpha) in sizes]
    if strategy_named(config.strategy).pooled:
        clients = [max(clients, key=lambda client: client.rank)]
    if config.groups is not None:
        clients = [Group("all", clients, inner=config.groups.inner)]
    options = config.strategy_options()
    first = first_broadcast(config.strategy, {"rehearsal": (4, 4)}, clients, config.seed, options)
    Server(config.strategy, clients, first, 1.0, config.weighting, config.seed, options=options,
           downlink=Downlink(config.downlink, config.downlink_tol), trust=guards.trust_of(config)).rehearse()


def device_and_dtype(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """The config's device and dtype with "auto" decided. Raises ConfigError for a device that is not there."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: expected one of this machine; got {name!r} ({str(error).splitlines()[0]}). Use device: auto "
                          "or cpu.") from error
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, auto if config.dtype == "auto" else config.dtype)


def train_config(config: RunConfig, pad_token_id: int, steps_factor: int = 1) -> TrainConfig:
    """The part of a config that a client trains by. steps_factor multiplies max_steps."""
    return TrainConfig(
        learning_rate=config.learning_rate, max_steps=config.max_steps and config.max_steps * steps_factor,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps, max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay, warmup_steps=config.warmup_steps, lr_scheduler_type=config.lr_scheduler_type,
        lora_dropout=config.lora_dropout, seed=config.seed, num_train_epochs=config.num_train_epochs or 1.0,
        pad_token_id=pad_token_id, gradient_checkpointing=config.gradient_checkpointing,
        adapter_dtype=None if config.adapter_dtype == "float32" else config.adapter_dtype, proximal_mu=config.proximal_mu,
        adalora_keep=(config.adalora_keep or 0.5) if config.adalora else None, **_pruning(config))


def _pruning(config: RunConfig) -> dict[str, float]:
    """HetLoRA's settings on the clients, with what is not given filled in."""
    if not strategy_named(config.strategy).prunes:
        return {}
    return {"rank_decay": 0.99 if config.rank_decay is None else config.rank_decay,
            "rank_penalty": 5e-3 if config.rank_penalty is None else config.rank_penalty}


def dealt(config: RunConfig, rows: Sequence[Row]) -> Splits:
    """Which rows each client trains on (max_examples_per_client of them at most) and holds out, and which the server holds out.

    Raises DataError where a client or the server would have none.
    """
    rule = config.partition.model_dump(exclude_defaults=True) or {"iid": True}
    members = partition(rows, config.num_clients, Partition(**rule), config.seed)
    splits = split(rows, members, config.seed, config.eval_rows_per_client, config.server_eval_rows)
    empty = [name for name, indices in splits.train.items() if not indices]
    if empty:
        raise DataError(f"expected training rows for every client; after the held-out rows, got none for {', '.join(empty)}. "
                        "Lower num_clients, server_eval_rows or eval_rows_per_client, or bring more rows.")
    if not splits.server:
        raise DataError(f"expected held-out rows for the server; got none out of {len(rows)} rows. Raise server_eval_rows, or "
                        "bring more rows.")
    kept = {name: epoch_order(len(indices), config.seed, name, "kept")[:config.max_examples_per_client]
            for name, indices in splits.train.items()}
    return replace(splits, train={name: sorted(indices[i] for i in kept[name]) for name, indices in splits.train.items()})


def base_model(config: RunConfig, folder: Path | None = None) -> "PreTrainedModel":
    """The model of this config on its device; folder: with the weights of a checkpoint, in the place of the original ones."""
    device, dtype = device_and_dtype(config)
    return load_model(folder or config.model_name_or_path, dtype, config.num_hidden_layers).to(device)


def prepare(config: RunConfig, say: Callable[[str], None], base: "Path | PreTrainedModel | None" = None,
            only: Collection[int] | None = None) -> Job:
    """Loads data, tokenizer and model, deals and splits the rows. say gets a line for each step; base: a folder with the
    weights of a checkpoint, in the place of the original ones, or the model itself; only: the clients to make ready, by their
    places (None: all).

    A pooled strategy (centralized) gets one client with everybody's rows, the largest rank, and max_steps times the clients.
    Raises DataError, FetchError, ConfigError.
    """
    pooled = strategy_named(config.strategy).pooled
    device, dtype = device_and_dtype(config)
    say(f"data: {config.dataset}")
    rows = load_rows(config.dataset)
    splits = dealt(config, rows)
    say(f"model: {config.model_name_or_path}, {str(dtype).removeprefix('torch.')} on {device}")
    tokenizer = load_tokenizer(config.model_name_or_path)
    model = base_model(config, base) if base is None or isinstance(base, Path) else base

    def tokens(indices: list[int]) -> Rows:
        return tokenize_rows(tokenizer, [rows[i] for i in indices], config.max_length, config.chat_template)

    held_out = {"": splits.server, **splits.eval}
    if pooled:
        held_out = {"": splits.server, POOLED: [i for indices in splits.eval.values() for i in indices]}
    scores = scores_of(config, tokenizer, {name: [rows[i] for i in indices] for name, indices in held_out.items()})
    clients, eval_rows, own = [], {}, {}
    everybody = zip(splits.train.items(), config.ranks(), config.alphas(), strict=True)
    for (name, indices), rank, alpha in (one for i, one in enumerate(everybody) if only is None or i in only):
        clients.append(LocalClient(name, tokens(indices), rank, alpha))
        own[name] = [rows[i] for i in indices]
        eval_rows[name] = tokens(splits.eval[name])
    found: Histograms = {}
    if config.groups is not None:
        label = config.groups.label or config.partition.label
        found = histograms(own, label) if label else token_histograms({c.name: [r["input_ids"] for r in c.rows] for c in clients})
    if pooled:
        largest = max(clients, key=lambda client: client.rank)
        everything = [row for client in clients for row in client.rows]
        clients = [LocalClient(POOLED, everything, largest.rank, largest.alpha)]
        eval_rows = {POOLED: [row for rows_ in eval_rows.values() for row in rows_]}
    factor = max(1, round(config.fraction_train * config.num_clients)) if pooled else 1
    return Job(model, tokenizer, clients, eval_rows, tokens(splits.server),
               train_config(config, tokenizer.pad_token_id or 0, factor), config.per_device_eval_batch_size,
               merge_config(config), scores, found)


def merge_config(config: RunConfig) -> MergeConfig:
    """The part of a config that says how merges reach a base."""
    return MergeConfig(config.merge_into, config.merge_rounding, config.merge_residual, config.seed, config.merge_rank,
                       config.merge_tol)


def new_server(config: RunConfig, shapes: Mapping[str, tuple[int, int]], clients: Sequence[LocalClient | Group],
               broadcast: Broadcast | None = None, key: bytes = guards.NO_KEY) -> Server:
    """The server of this run, which has tried its strategy on these clients' ranks and alphas: what it would refuse after the first
    round of training it refuses now. Under a name of the run's own, so merges are counted per run. broadcast: of a checkpoint;
    key: of the run's noise."""
    options = config.strategy_options()
    if broadcast is None:
        broadcast = replace(first_broadcast(config.strategy, shapes, clients, config.seed, options), run=secrets.token_hex(8))
    server = Server(config.strategy, clients, broadcast, min(1.0, config.fraction_train * config.over_sampling), config.weighting,
                    config.seed, options=options, downlink=Downlink(config.downlink, config.downlink_tol), shapes=shapes,
                    trust=guards.guarded(config, shapes, leaves(clients), key))
    server.rehearse()
    return server


def sent_up(update: Update, home: str) -> Update:
    """What leaves a client: not the factors that stay at home, and no clock, so that equal runs send equal bytes."""
    metrics = {name: value for name, value in update.metrics.items() if name not in ("seconds", "tokens_per_second")}
    return replace(update, adapters=leave_home(update.adapters, home), metrics=metrics)

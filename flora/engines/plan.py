"""`flora run --dry-run`: what a run would be, down to partitions, ranks and bytes, without weights and without training.

Bytes are counted on messages that the strategy itself makes of random updates, for one layer of each shape, times the layers of
that shape. A model or a data set of the hub that is not reached is taken from data.known, where it is there.
"""
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from flora.adapter import Adapter, truncate
from flora.client import LocalClient
from flora.config import RunConfig
from flora.data import load_rows
from flora.data.batches import steps_per_epoch
from flora.data.known import ARCHITECTURES, ROWS
from flora.data.models import resolve_model, shortened
from flora.downlink import Downlink
from flora.engines import guards
from flora.engines.prepare import POOLED, dealt, device_and_dtype, rehearse
from flora.engines.traffic import Traffic
from flora.errors import DataError
from flora.frames import frame
from flora.group import Group
from flora.inbox import Trust
from flora.member import starting_adapters
from flora.messages import Broadcast, Update
from flora.nn import target_shapes
from flora.server import Server, first_broadcast
from flora.strategies import leave_home, strategy_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """parameters: of the model; shapes: (out, in) of the layers with adapters; clients: name, rows, rank, alpha, steps of a round;
    up, down: bytes of all clients, a round; first: bytes down before the first; full: bytes of the model's parameters."""
    parameters: int
    shapes: Shapes
    clients: Sequence[dict[str, Any]]
    up: Sequence[int]
    down: Sequence[int]
    first: int
    full: int


def outline(config: RunConfig) -> "PreTrainedModel":
    """The model without its weights, on the meta device. Raises DataError where its config cannot be read and is not known."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = resolve_model(config.model_name_or_path)
    if where in ARCHITECTURES:
        own = AutoConfig.for_model(**ARCHITECTURES[where])
    else:
        try:
            own = AutoConfig.from_pretrained(where)
        except Exception as error:                              # transformers raises a dozen classes for one fact
            raise DataError(f"model {config.model_name_or_path}: expected a config.json that can be read; got "
                            f"{type(error).__name__}: {str(error).splitlines()[0]}. Known without one: {', '.join(ARCHITECTURES)}."
                            ) from error
    if config.num_hidden_layers is not None:
        try:
            own = shortened(own, config.num_hidden_layers)
        except ValueError as error:
            raise DataError(f"model {config.model_name_or_path}: {error}") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own)


def _rows(config: RunConfig) -> dict[str, int]:
    """Training rows of every client, by name: exact, but for data sets of the hub that are known by their number of rows alone,
    where no row reads like another."""
    known = config.dataset in ROWS and config.partition.model_dump(exclude_defaults=True) in ({}, {"iid": True})
    rows: Sequence[Mapping[str, Any]]
    rows = [{"prompt": i, "completion": ""} for i in range(ROWS[config.dataset])] if known else load_rows(config.dataset)
    return {name: len(own) for name, own in dealt(config, rows).train.items()}


def plan(config: RunConfig, rounds: int = 2) -> Plan:
    """What the run of this config would be; bytes of so many first rounds. Raises what the run would raise before it trains."""
    rehearse(config)
    model = outline(config)
    shapes = target_shapes(model, config.target_modules)
    counts = _rows(config)
    clients = [{"client": name, "rows": kept, "rank": rank, "alpha": alpha, "steps": config.max_steps}
               for (name, kept), rank, alpha in zip(counts.items(), config.ranks(), config.alphas(), strict=True)]
    if strategy_named(config.strategy).pooled:
        times = max(1, round(config.fraction_train * config.num_clients))
        clients = [{**max(clients, key=lambda c: c["rank"]), "client": POOLED, "rows": sum(c["rows"] for c in clients),
                    "steps": config.max_steps and config.max_steps * times}]
    for client in clients:
        epoch = steps_per_epoch(client["rows"], config.per_device_train_batch_size, config.gradient_accumulation_steps)
        client["steps"] = client["steps"] or math.ceil((config.num_train_epochs or 1.0) * epoch)
    parties = [LocalClient(c["client"], [{}] * c["rows"], c["rank"], c["alpha"]) for c in clients]
    up, down, first = _whole(config, shapes, parties, rounds)
    parameters = sum(p.numel() for p in model.parameters())
    return Plan(parameters, shapes, clients, up, down, first, device_and_dtype(config)[1].itemsize * parameters)


def bytes_of_a_round(config: RunConfig, shapes: Shapes, parties: Sequence[LocalClient | Group]) -> int:
    """Bytes up and down of the first round, all clients together, as a dry run counts them."""
    flat = [party if isinstance(party, LocalClient) else _as_client(party) for party in parties]
    up, down, _ = _whole(config, shapes, flat, 1)
    return up[0] + down[0]


def _as_client(group: Group) -> LocalClient:
    """A client whose adapters are as large as a group's answer."""
    rank = group.rank or group.inner_rounds * sum(client.rank for client in group.clients)
    return replace(group.clients[0], name=group.name, rank=rank)


def _whole(config: RunConfig, shapes: Shapes, parties: Sequence[LocalClient], rounds: int) -> tuple[list[int], list[int], int]:
    """Bytes up and down of each round, and down before the first: those of a layer of each shape, as often as there are layers."""
    up, down, first = [0] * rounds, [0] * rounds, 0
    for shape, times in Counter(shapes.values()).items():
        one = _bytes(config, {"layer": shape}, parties, rounds)
        first += times * one[2]
        up = [a + times * b for a, b in zip(up, one[0], strict=True)]
        down = [a + times * b for a, b in zip(down, one[1], strict=True)]
    return up, down, first


def _bytes(config: RunConfig, shapes: Shapes, parties: Sequence[LocalClient],
           rounds: int) -> tuple[list[int], list[int], int]:
    """Bytes up and down of each round, and down before the first, of a model that has this layer alone."""
    options = config.strategy_options()
    server = Server(config.strategy, parties, first_broadcast(config.strategy, shapes, parties, config.seed, options),
                    config.fraction_train, config.weighting, config.seed, options=options,
                    downlink=Downlink(config.downlink, config.downlink_tol), shapes=shapes,
                    trust=None if config.secure_aggregation else _without_chance(guards.guarded(config, shapes, parties)))
    server.rehearse()
    traffic, draw = Traffic(), torch.Generator().manual_seed(config.seed)
    dtype = device_and_dtype(config)[1]
    base = {n: torch.zeros(shape, dtype=dtype) for n, shape in shapes.items()} if config.merge_into == "base" else None
    first = sum(traffic.down(server, server.sample(0)).values())
    up, down = [], []
    for number in range(rounds):
        sent = server.broadcast
        trained = [_trained(client, sent, shapes, config, draw) for client in server.sample(number)]
        updates = [replace(u, adapters=leave_home(u.adapters, server.strategy.home)) for u in trained]
        server.close(updates, base)
        up.append(guards.masked_bytes(config, shapes, server.sample(number)) if config.secure_aggregation
                  else sum(traffic.up(server, updates, sent).values()))
        down.append(sum(traffic.down(server, server.sample(number + 1)).values()))
    return up, down, first


def _without_chance(trust: Trust) -> Trust:
    """The same for a round of as many clients as are expected, whose updates are noise already."""
    combine = trust.combine
    if combine is not None:
        combine = replace(combine, settings=replace(combine.settings, noise_multiplier=0.0))
    return replace(trust, combine=combine, sample=None, robust=None, min_clients=1)


def _trained(client: LocalClient, sent: Broadcast, shapes: Shapes, config: RunConfig, draw: torch.Generator) -> Update:
    """An update of this client whose trained parts are noise."""
    def noise(*size: int) -> torch.Tensor:
        return 0.01 * torch.randn(size, generator=draw)

    adapters, metrics = {}, {"tokens": 1}
    if sent.train == "weight":
        weights = {n: noise(*shape).to(device_and_dtype(config)[1]) for n, shape in shapes.items()}
        return Update({}, len(client.rows), metrics, sent.version, client.name, weights)
    for name, a in starting_adapters(client, sent.start, shapes, config.seed, sent.version).items():
        a = a.to(getattr(torch, config.adapter_dtype))
        A = a.A + noise(*a.A.shape) if "A" in sent.train else a.A
        if sent.train == "core":
            A = noise(a.rank, a.rank) @ frame(a.shape, a.rank, sent.frame, name)[0].to(a.A)
        B = a.B + noise(*a.B.shape) if "B" in sent.train else a.B
        adapters[name] = Adapter(A, B, a.scale).to(a.A.dtype)
        if config.adalora:
            adapters[name] = truncate(adapters[name], max(1, math.ceil((config.adalora_keep or 0.5) * a.rank)))
    return Update(adapters, len(client.rows), metrics, sent.version, client.name)


def show(config: RunConfig, found: Plan) -> None:
    """Prints a plan."""
    console = Console()
    total = found.first + sum(_extended(found.up, config.num_rounds)) + sum(_extended(found.down, config.num_rounds))
    whole = 2 * found.full * config.num_rounds * max(1, round(config.fraction_train * config.num_clients))
    console.print(f"{config.model_name_or_path}: {found.parameters / 1e6:,.0f} million parameters, adapters on {len(found.shapes)} "
                  f"layers; strategy {config.strategy}, {config.num_rounds} rounds of {len(found.clients)} clients",
                  highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE)
    for name in ("client", "rows", "rank", "alpha", "steps a round"):
        table.add_column(name, justify="left" if name == "client" else "right")
    for client in found.clients:
        table.add_row(*(str(client[key]) for key in ("client", "rows", "rank")), f"{client['alpha']:g}", str(client["steps"]))
    console.print(table)
    console.print(f"a round: {_mb(found.up[-1])} up, {_mb(found.down[-1])} down, all clients together; before the first: "
                  f"{_mb(found.first)} down", highlight=False, soft_wrap=True)
    console.print(f"the run: {_mb(total)}, {total / whole:.2%} of the whole model going up and down for each client in every round",
                  highlight=False, soft_wrap=True)
    if config.communication_budget_mb and total > 1e6 * config.communication_budget_mb:
        console.print(f"more than the budget of {config.communication_budget_mb:g} MB: it would stop early", highlight=False)


def _extended(values: Sequence[int], rounds: int) -> list[int]:
    """Later rounds are as the last one that was counted."""
    return [values[min(number, len(values) - 1)] for number in range(rounds)]


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"

"""What `mypy --strict` sees of flora in a user's code: every lazy name with its own type. Read by mypy, never run."""
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import flora
from flora import Adapter, Broadcast, Update, aggregate
from flora.integrations import peft


def one_round(model: nn.Module, rows: list[dict[str, list[int]]]) -> nn.Module:
    clients = [flora.LocalClient("a", rows, rank=8), flora.LocalClient("b", rows, rank=4)]
    cohort = flora.Cohort(model, clients, flora.TrainConfig(learning_rate=1e-3, max_steps=2))
    updates = assert_type(cohort.fit(Broadcast()), list[Update])
    sent = assert_type(flora.aggregate(updates, strategy="flora"), Broadcast)
    if sent.merge is not None:
        for name, stacked in sent.merge.items():
            assert_type(name, str)
            assert_type(flora.compress(stacked, rank=4), Adapter)
        flora.merge(model, sent.merge)
    return flora.detach(model)


def algebra() -> Adapter:
    a = Adapter(torch.ones(2, 3), torch.ones(4, 2), 0.5)
    assert_type(a.scale, Tensor)
    assert_type(a.rank, int)
    assert_type(0.25 * a, Adapter)
    return flora.stack([a, flora.pad(a, 4), flora.truncate(a, 1), flora.fold(flora.rescale(a, 1.0)), flora.mean([a, a], [1, 2])])


def operators(x: Tensor, weight: Tensor, a: Adapter) -> Tensor:
    y = assert_type(flora.ops.lora_linear(x, weight, a.A, a.B, a.scale, row_offsets=[0, 1], rank_offsets=[0, 2], frozen=a), Tensor)
    flora.ops.merge_(weight, a.A, a.B, a.scale)
    return flora.ops.lora_add_(y, x, a.A, a.B, a.scale)


def messages(update: Update) -> Update | Broadcast:
    assert_type(flora.messages.encode(update), bytes)
    return flora.messages.decode(b"")


def runs() -> Path:
    assert_type(flora.STRATEGIES["flora"].name, str)
    with flora.kernels.use("reference"):
        assert_type(flora.run({"num_rounds": 1}), Path)
    return flora.run("config.yaml")


def layers(model: nn.Module) -> flora.Adapters:
    flora.load_adapters(flora.attach(model, rank=8, targets=("q_proj",)), flora.adapters(model))
    layer = flora.LoRALinear(nn.Linear(3, 4), rank=2)
    assert_type(layer.adapter, Adapter)
    peft.save(flora.adapters(model), "folder", base_model="name")
    return peft.load("folder")


def groups(clients: list[flora.LocalClient]) -> Broadcast:
    group = flora.Group("g", clients)
    return aggregate([Update({}, 1, client=group.name)], "fedit", weights="uniform")

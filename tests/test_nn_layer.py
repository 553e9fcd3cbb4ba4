"""The layer itself: PEFT's numbers, dropout in training alone, a scale that stays fp32, adapters applied for one block of code."""
import copy
import io

import pytest
import torch
from oracles import adapter, check, gpt2, llama, output_and_gradients, randomise, relative, tokens
from torch import nn

import flora
from flora import ops
from flora.adapter import Adapter, pad
from flora.errors import AdapterError, TargetError
from flora.layer import LoRALinear, Routing
from flora.nn import applied, lora_layers
from flora.seeds import derive


def twins(dtype, rank=4, alpha=6, bias=True):
    """Our layer, its factors in fp32 whatever the base, and PEFT's with the same numbers in the base's dtype."""
    peft = pytest.importorskip("peft", reason="peft is not installed: its LoRA layer was not compared")
    base = nn.Linear(11, 13, bias=bias).to(dtype)
    ours = LoRALinear(copy.deepcopy(base), rank, alpha)
    nn.init.normal_(ours.B)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    theirs.to(dtype)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.A)
        theirs.lora_B["default"].weight.copy_(ours.B)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_pefts(dtype, bias):
    ours, theirs = twins(dtype, bias=bias)
    x, dy = torch.randn(3, 5, 11).to(dtype), torch.randn(3, 5, 13).to(dtype)

    def run(layer, factors):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        return [y.detach(), leaf.grad, *(f.grad.to(ours.A.dtype) for f in factors)]

    actual = run(ours, (ours.A, ours.B))
    expected = run(theirs, (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight))
    base, scale = copy.deepcopy(ours.base).double(), ours.scale.double()

    def dense(x, A, B):
        return base(x) + x @ ((B * scale) @ A).T

    exact = output_and_gradients(dense, [x.double(), ours.A.double(), ours.B.double()], dy.double())
    for what, a, p, e in zip(("y", "dx", "dA", "dB"), actual, expected, exact, strict=True):
        check(a, p, e, dtype, what)
    assert torch.equal(ours.scale, torch.full((4,), 1.5))


def test_the_layer_alone_has_the_face_of_a_linear():
    layer = LoRALinear(nn.Linear(5, 7), rank=3, alpha=6, dropout=0.25)
    assert (layer.in_features, layer.out_features) == (5, 7)
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert layer.A.shape == (3, 5) and layer.B.shape == (7, 3) and not layer.B.any()
    assert torch.equal(layer.scale, torch.full((3,), 2.0))
    assert "rank=3, dropout=0.25" in repr(layer)
    assert {n for n, _ in layer.named_parameters()} == {"A", "B", "base.weight", "base.bias"}
    assert LoRALinear(nn.Linear(5, 7).double()).A.dtype == torch.float64
    assert LoRALinear(nn.Linear(5, 7).bfloat16(), dtype=torch.bfloat16).A.dtype == torch.bfloat16
    assert LoRALinear(nn.Linear(5, 7).half()).A.dtype == torch.float32


@pytest.mark.parametrize("base", [nn.Conv2d(3, 3, 1), nn.Embedding(5, 7), nn.Bilinear(2, 3, 4)], ids=lambda m: type(m).__name__)
def test_other_modules_are_refused(base):
    with pytest.raises(TargetError, match="expected an nn.Linear, a Conv1D or a quantised linear"):
        LoRALinear(base)


def test_bad_numbers_are_refused():
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(TargetError, match="dropout in"):
            LoRALinear(nn.Linear(5, 7), dropout=dropout)
    for rank in (0, -1):
        with pytest.raises(AdapterError, match="rank of at least 1"):
            flora.attach(nn.Sequential(nn.Linear(5, 7)), rank=rank)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.double()])
def test_casting_a_model_leaves_scale_in_fp32(cast):
    """alpha / rank that fp16 cannot hold."""
    model = flora.attach(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7)), rank=3, alpha=1)
    before = model[0].scale.clone()
    cast(model)
    assert torch.equal(model[0].scale, before) and model[0].scale.dtype == torch.float32
    assert model[0].A.dtype == model[0].base.weight.dtype != torch.float32
    assert model.to("meta")[1].scale.device.type == "meta"


def test_the_state_of_a_layer_survives_saving_copying_and_pickling():
    model = flora.attach(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7)), rank=3, alpha=1)
    randomise(model)
    twin = copy.deepcopy(model)
    buffer, x = io.BytesIO(), torch.randn(2, 5)
    torch.save(model, buffer)
    buffer.seek(0)
    other = flora.attach(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7)), rank=3, alpha=7)
    other.load_state_dict(model.state_dict())
    for again in (twin, other, torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), model(x))
        flora.detach(again)
        assert all(p.requires_grad for p in again.parameters())
    assert len(lora_layers(model)) == 2 and not torch.equal(flora.detach(twin)(x), model(x))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_modes_are_kept_and_dropout_is_for_training(make):
    model = make()
    for part in model.modules():                                       # GPT-2 has dropout of its own
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    ids = tokens()
    model.train()
    next(m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0"))).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flora.attach(model, rank=4, dropout=0.5)
    randomise(model)
    assert all(module.training == modes[name] for name, module in model.named_modules() if name in modes)
    assert all(layer.training == layer.base.training for layer in lora_layers(model).values())
    assert {layer.training for layer in lora_layers(model).values()} == {True, False}
    one, two = model(ids).logits, model(ids).logits
    assert not torch.equal(one, two)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    expected = model(ids).logits
    for layer in lora_layers(model).values():
        layer.dropout = 0.0
    model.train()
    assert torch.equal(model(ids).logits, expected)


def test_the_keys_of_all_layers_at_once_are_those_of_each():
    routing, keys = Routing(names=["a", "b"]), ops.row_keys(1, torch.arange(6))
    assert routing.keys_of("a") is None
    for routing.row_keys in (keys, keys + 1):
        assert all(torch.equal(routing.keys_of(name), ops.row_keys(routing.row_keys, derive(name))) for name in ("b", "a", "other"))


def test_row_keys_fix_the_masks_and_layers_differ():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    flora.attach(model, rank=8, alpha=8, dropout=0.5)
    eye = Adapter(torch.eye(8), torch.eye(8), 1.0)
    flora.load_adapters(model, {"0": eye, "1": eye})
    model.requires_grad_(False)
    for layer in model:
        layer.base.weight.zero_()
        layer.routing.row_keys = ops.row_keys(1, torch.arange(6))
    assert model[0].routing is model[1].routing
    x = torch.ones(6, 8)
    assert torch.equal(model[0](x), model[0](x)) and not torch.equal(model[0](x), model[1](x))


def test_routing_gives_every_client_its_ranks():
    model = flora.attach(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    clients = [{"0": adapter(8, 6, r), "2": adapter(3, 8, r)} for r in (2, 5, 1)]
    flora.load_adapters(model, {name: flora.stack([c[name] for c in clients]) for name in ("0", "2")})
    x, rows = torch.randn(9, 6).double(), [0, 4, 4, 9]
    model[0].routing.segments = ops.Segments(rows, [0, 2, 7, 8])
    packed = model(x)
    flora.detach(model)
    for k, client in enumerate(clients):
        with applied(model, client):
            mine = slice(rows[k], rows[k + 1])
            assert k == 1 or relative(packed[mine], model(x[mine])) <= 1e-6


def test_frozen_ranks_of_a_layer_add_to_what_it_trains():
    layer, frozen = LoRALinear(nn.Linear(5, 7).double(), 2), adapter(7, 5, 3)
    x = torch.randn(4, 5).double()
    before = layer(x)
    layer.frozen = ops.Frozen(frozen.A, frozen.B, frozen.scale)
    assert relative(layer(x) - before, x @ frozen.delta().T) <= 1e-6


def test_applied_attaches_for_a_block_and_detaches_whatever_happens():
    model = llama()
    before, names = {n: t.clone() for n, t in model.state_dict().items()}, [n for n, _ in model.named_modules()]
    some = {f"model.layers.{i}.self_attn.q_proj": adapter(16, 16, i + 2) for i in (0, 1)}
    with pytest.raises(ZeroDivisionError), applied(model, some, dropout=0.5) as layers:
        assert set(layers) == set(some) == set(flora.adapters(model))
        assert all(layer.dropout == 0.5 and layer.name == name for name, layer in layers.items())
        assert all(torch.equal(a.A, some[n].A) and torch.equal(a.scale, some[n].scale) for n, a in flora.adapters(model).items())
        assert [p.requires_grad for p in model.parameters()].count(True) == 4
        raise ZeroDivisionError
    assert [n for n, _ in model.named_modules()] == names and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    flora.attach(model)


def test_applied_is_merge_for_a_while():
    model, ids = llama(torch.float64), tokens()
    some = {f"model.layers.{i}.mlp.down_proj": pad(adapter(16, 24, 3), 5) for i in (0, 1)}
    with applied(model, some):
        inside = model(ids).logits
    flora.merge(model, some)
    assert relative(model(ids).logits, inside) <= 1e-6


def test_training_a_tiny_model_moves_only_the_adapters():
    model, ids = llama(), tokens()
    flora.attach(model, rank=2, dropout=0.1)
    model.train()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if not p.requires_grad)
    assert all(a.B.any() for a in flora.adapters(model).values())


class Renamed(nn.Linear):
    """A subclass with no state of its own, as Falcon's."""


class Counting(nn.Linear):
    """A subclass that keeps more than a weight and a bias: what its forward does with it is not ours to guess."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(1))


def test_a_subclass_of_linear_carries_an_adapter_if_it_has_no_state_of_its_own():
    model = nn.ModuleDict({"plain": Renamed(4, 3), "counting": Counting(4, 3), "attention": nn.MultiheadAttention(4, 2)})
    assert list(lora_layers(flora.attach(model, rank=2))) == ["plain"]
    with pytest.raises(flora.errors.TargetError, match="counting"):
        flora.attach(flora.detach(model), rank=2, targets=("counting",))

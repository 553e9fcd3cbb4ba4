"""Layers that read the same tensor are one call and give what they give alone; quantised bases keep their own product."""
import copy
import pickle

import oracles
import pytest
import torch
from oracles import llama, randomise, relative, tokens
from tiny import Int8Linear, quantise
from torch import nn

import flora
from flora import ops
from flora.errors import TargetError
from flora.nn import lora_layers


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the operator had."""
    seen, run = [], ops.lora_linears
    monkeypatch.setattr(ops, "lora_linears", lambda x, weights, *a, **k: (seen.append(len(weights)), run(x, weights, *a, **k))[1])
    return seen


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for layer in lora_layers(model).values() for p in (layer.A, layer.B))]


def alone(model):
    for layer in lora_layers(model).values():
        if layer.shared is not None:
            layer.shared.part()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_q_k_v_and_gate_up_are_one_call_and_give_what_they_give_alone(calls, checkpointing):
    model = flora.attach(llama(), rank=3)
    randomise(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    together = gradients(model, tokens())
    assert calls == [3, 1, 2, 1] * (2 + 2 * checkpointing)
    alone(model)
    calls.clear()
    apart = gradients(model, tokens())
    assert set(calls) == {1}
    assert all(relative(a, b) < 1e-5 for a, b in zip(together, apart, strict=True))
    assert torch.equal(together[0], apart[0])


def test_dropout_masks_are_the_layers_own(calls):
    model = flora.attach(llama(), rank=3, dropout=0.4).train()
    randomise(model)
    layers = lora_layers(model)
    next(iter(layers.values())).routing.row_keys = ops.row_keys(1, torch.arange(18))
    together = gradients(model, tokens())
    assert 3 in calls
    alone(model)
    assert all(relative(a, b) < 1e-4 for a, b in zip(together, gradients(model, tokens()), strict=True))


class Crossed(nn.Module):
    """Attention whose keys read another tensor than its queries."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x, memory, fail=False):
        q = self.q_proj(x)
        if fail:
            raise ZeroDivisionError
        return q + self.k_proj(memory) + self.v_proj(memory)


def test_layers_that_read_other_tensors_after_all_part():
    model, x, memory = Crossed(), torch.randn(3, 6), torch.randn(3, 6)
    flora.attach(model, rank=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B)
    expected = sum(layer(t) for layer, t in zip(lora_layers(model).values(), (x, memory, memory), strict=True))
    for _ in range(2):
        assert torch.equal(model(x, memory), expected)
        assert model.q_proj.shared is None and not model._forward_hooks and not model._forward_pre_hooks


def test_nothing_waits_outside_the_parents_forward(calls):
    model, x = Crossed(), torch.randn(3, 6)
    flora.attach(model, rank=2)
    model.q_proj(x)
    assert calls == [1]                                             # called by itself: nothing is computed for others
    with pytest.raises(ZeroDivisionError):
        model(x, x, fail=True)
    shared = model.q_proj.shared
    assert not shared.passes
    before = model(x, x)
    with torch.no_grad():
        model.k_proj.B.fill_(1.0)
    assert not torch.equal(model(x, x), before)                     # no output of an earlier pass is used again
    flora.detach(model)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_copy_and_a_pickle_share_among_themselves():
    model, x = Crossed(), torch.randn(3, 6)
    flora.attach(model, rank=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q_proj.shared is not model.q_proj.shared and other.q_proj.shared.layers[0] is other.q_proj
        with torch.no_grad():
            other.q_proj.B.fill_(1.0)
        assert not torch.equal(other(x, x), model(x, x))
        assert other.q_proj.shared is not None


def test_clients_and_frozen_ranks_share_too():
    model = flora.attach(llama(), rank=5)
    randomise(model)
    layers = lora_layers(model)
    segments, ranges = ops.Segments([0, 9, 18], [0, 2, 5]), [(0, 2), (1, 3)]
    next(iter(layers.values())).routing.segments = segments
    for layer in layers.values():
        held = oracles.adapter(layer.out_features, layer.in_features, 3)
        layer.frozen = ops.Frozen(held.A, held.B * 0.1, held.scale, ranges)
    first = next(iter(layers.values())).frozen.ranges
    apart = gradients(model, tokens())                              # ranges are equal, not one object: each layer alone
    for layer in layers.values():
        layer.frozen.ranges = first
    together = gradients(model, tokens())
    assert all(relative(a, b) < 1e-5 for a, b in zip(together, apart, strict=True))


def test_a_quantised_model_trains_through_its_own_products():
    model = quantise(llama(torch.float64))
    dense = copy.deepcopy(model)
    for module in list(dense.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Int8Linear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = child.weight * child.step
                module._modules[name] = linear
    flora.attach(model, rank=3, dtype=torch.float64), flora.attach(dense, rank=3, dtype=torch.float64)
    assert list(flora.adapters(model)) == list(flora.adapters(dense))
    flora.load_adapters(dense, randomise(model))
    for a, b in zip(gradients(model, tokens()), gradients(dense, tokens()), strict=True):
        assert relative(a, b) < 1e-12
    adapters = flora.adapters(model)
    with pytest.raises(TargetError, match="expected a weight in floating point to write to; got a Int8Linear"):
        flora.merge(model, adapters)
    flora.detach(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)

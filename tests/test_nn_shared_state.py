"""Sharing one pass of x changes nothing, whatever stands between the calls of the layers: modes, writes, checkpoints, threads."""
import threading

import pytest
import torch
from oracles import relative
from test_nn_shared import alone, calls
from torch import nn
from torch.utils.checkpoint import checkpoint

import flora
from flora.nn import lora_layers

__all__ = ["calls"]


def no_grad_first(m, x):
    with torch.no_grad():
        k = m.k_proj(x)
    return m.q_proj(x) * k + m.v_proj(x)


def no_grad_last(m, x):
    y = m.q_proj(x) + m.k_proj(x)
    with torch.no_grad():
        v = m.v_proj(x)
    return y * v


def autocast_first(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = m.q_proj(x)
    k, v = m.k_proj(x), m.v_proj(x)
    assert (q.dtype, k.dtype, v.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    return q + k + v


def written_between(m, x):
    x = x * 1
    q = m.q_proj(x).detach()
    x.mul_(2)
    return q + m.k_proj(x) + m.v_proj(x)


def grad_from_then_on(m, x):
    x = x.detach()
    q = m.q_proj(x)
    y = m.k_proj(x.requires_grad_()) + m.v_proj(x)
    return q + y + torch.autograd.grad(y.sum(), x, retain_graph=True)[0].sum()


def checkpointed(m, x):
    return checkpoint(lambda x: m.q_proj(x) * m.k_proj(x) + m.v_proj(x), x, use_reentrant=False)


def partly_checkpointed(m, x):
    q = m.q_proj(x)
    return checkpoint(lambda x: m.k_proj(x) * m.v_proj(x), x, use_reentrant=False) + q


def checkpointed_first(m, x):
    k = checkpoint(m.k_proj, x, use_reentrant=False)
    return m.q_proj(x) * k + m.v_proj(x)


def reentrant(m, x):
    return checkpoint(lambda x: m.q_proj(x) * m.k_proj(x) + m.v_proj(x), x, use_reentrant=True)


class Parent(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.how(self, x)


def parent(how):
    model = flora.attach(Parent(how), rank=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B)
    return model


@pytest.mark.parametrize("how", [no_grad_first, no_grad_last, autocast_first, written_between, grad_from_then_on, checkpointed,
                                 partly_checkpointed, checkpointed_first, reentrant], ids=lambda f: f.__name__)
def test_what_stands_between_the_calls_is_seen(how):
    model, x = parent(how), torch.randn(3, 6)

    def run():
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.float().square().sum().backward()
        grads = [leaf.grad, *(p.grad for layer in lora_layers(model).values() for p in (layer.A, layer.B))]
        return [y.detach(), *(torch.zeros(1) if g is None or not g.any() else g for g in grads)]

    together = run()
    assert model.q_proj.shared is not None and not model.q_proj.shared.passes
    alone(model)
    for a, b in zip(together, run(), strict=True):
        assert torch.equal(a, b) or relative(a, b) < 1e-6


def test_a_checkpoint_around_the_parent_shares_in_both_passes(calls):
    model, x = parent(lambda m, x: m.q_proj(x) * m.k_proj(x) + m.v_proj(x)), torch.randn(3, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert calls == [3, 3]


def test_inference_mode_shares(calls):
    model, x = parent(lambda m, x: m.q_proj(x) + m.k_proj(x) + m.v_proj(x)), torch.randn(3, 6)
    with torch.inference_mode():
        model(x.clone())
    assert calls == [3]


def test_replicas_compute_with_their_own_parameters(calls):
    """What DataParallel makes: shallow copies of every module, whose hooks and `shared` are the original's."""
    model, x = parent(lambda m, x: m.q_proj(x) + m.k_proj(x) + m.v_proj(x)), torch.randn(3, 6)
    replica = model._replicate_for_data_parallel()
    for name in ("q_proj", "k_proj", "v_proj"):
        own = getattr(model, name)
        child = own._replicate_for_data_parallel()
        child.A, child.B = own.A * 2, own.B
        replica._modules[name] = child
    y = replica(x)
    assert calls == [1, 1, 1] and model.q_proj.shared is not None
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.A.mul_(2)
    assert relative(y, model(x)) < 1e-6 and calls[3:] == [3]


def test_threads_do_not_meet():
    """One waits inside its forward while the other runs the whole of its own."""
    inside, go = threading.Event(), threading.Event()

    def slow(m, x):
        q = m.q_proj(x)
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go.wait(30)
        return q + m.k_proj(x) + m.v_proj(x)

    model, x, other, got = parent(slow), torch.randn(3, 6), torch.randn(4, 6), []
    thread = threading.Thread(target=lambda: got.append(model(other).detach()))
    thread.start()
    assert inside.wait(30)
    mine = model(x).detach()
    go.set()
    thread.join(30)
    assert model.q_proj.shared is not None
    alone(model)
    assert relative(mine, model(x)) < 1e-6 and relative(got[0], model(other)) < 1e-6

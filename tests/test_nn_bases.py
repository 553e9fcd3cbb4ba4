"""Bases that do more than multiply with a plain weight: parametrized, hooked, or with a forward of their own."""
import contextlib

import pytest
import torch
from oracles import adapter, relative
from torch import nn
from torch.nn.utils import parametrize

import flora
from flora import kernels
from flora.errors import TargetError
from flora.nn import accumulate, applied, lora_layers


class Doubled(nn.Linear):
    """A forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Tanh(nn.Linear):
    """A forward whose backward pass needs what it gave."""

    def forward(self, x):
        return super().forward(x).tanh()


class Router(nn.Linear):
    """A forward that gives no tensor, as the routers of some mixtures do."""

    def forward(self, x):
        return super().forward(x), None


class FalconLinear(nn.Linear):
    """Falcon's, which spells out the product."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Half(nn.Module):
    def forward(self, w):
        return w / 2


def hooked():
    linear, kept = nn.Linear(5, 3), []
    linear.register_forward_hook(lambda m, args, y: kept.append((y, y.detach().clone())))
    linear.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    linear.kept = kept
    return linear


def on_the_instance():
    """As accelerate replaces the forward of what it hooks."""
    accelerate = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed: its hooks were not tested")

    class Shift(accelerate.ModelHook):
        def pre_forward(self, module, x):
            return (x + 1,), {}

    return accelerate.add_hook_to_module(nn.Linear(5, 3), Shift())


@pytest.mark.parametrize("make", [hooked, on_the_instance, lambda: Doubled(5, 3), lambda: Tanh(5, 3)],
                         ids=["hooks", "accelerate", "subclass", "subclass that keeps its output"])
def test_an_adapter_adds_to_what_the_module_itself_gives(make):
    model = nn.Sequential(make())
    x, held = torch.randn(4, 5), adapter(3, 5, 2)
    before = model(x).detach()
    with applied(model, {"0": held}) as layers:
        assert layers["0"].opaque
        y = model(x.requires_grad_())
        y.sum().backward()
        assert relative(y, before + x.double() @ held.delta().T) < 1e-6 and layers["0"].A.grad is not None
    assert all(torch.equal(y, copy) for y, copy in getattr(model[0], "kept", ()))       # what a hook keeps stays as it was
    accumulate(model, {"0": held})
    assert relative(model(x), before + x.double() @ held.delta().T) < 1e-6


@pytest.mark.parametrize("make", [hooked, on_the_instance, lambda: FalconLinear(5, 3)], ids=["hooks", "accelerate", "falcon"])
def test_hooks_do_not_keep_an_update_out_of_the_weight(make):
    model, held = nn.Sequential(make()), adapter(3, 5, 2)
    before = model[0].weight.detach().clone()
    with kernels.use("reference"):
        flora.merge(model, {"0": held})
    assert relative(model[0].weight, before + held.delta()) < 1e-6


@pytest.mark.parametrize("how", [flora.merge, lambda m, a: flora.nn.weights(m, list(a))], ids=["merge", "weights"])
def test_nothing_is_merged_under_a_forward_that_may_do_more(how):
    put = nn.Linear(5, 3)
    put.forward = lambda x: x[:, :3]
    for module in (Doubled(5, 3), put):
        model = nn.Sequential(module)
        before = module.weight.detach().clone()
        with pytest.raises(TargetError, match="0: expected a module that gives x Wᵀ \\+ bias.*flora.nn.accumulate"):
            how(model, {"0": adapter(3, 5, 2)})
        assert torch.equal(module.weight, before)


def test_a_weight_that_is_computed_is_refused():
    model = nn.Sequential(nn.Linear(5, 3))
    parametrize.register_parametrization(model[0], "weight", Half())
    held = {"0": adapter(3, 5, 2)}
    for call in (lambda: flora.attach(model, rank=2), lambda: flora.attach(model, rank=2, targets=["0"]),
                 lambda: flora.merge(model, held), lambda: flora.nn.weights(model, ["0"]), lambda: flora.LoRALinear(model[0]),
                 lambda: contextlib.ExitStack().enter_context(applied(model, held))):
        with pytest.raises(TargetError, match="expected a weight that is a parameter.*remove_parametrizations"):
            call()
    assert not lora_layers(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert len(lora_layers(flora.attach(model, rank=2))) == 1


def test_a_module_that_gives_no_tensor_says_so():
    model = flora.attach(nn.Sequential(Router(5, 3)), rank=2)
    with pytest.raises(TargetError, match="expected a tensor from a linear module; Router gives a tuple"):
        model(torch.randn(4, 5))


def test_falcon_keeps_the_fast_path_and_hooked_layers_share_nothing():
    assert not flora.LoRALinear(FalconLinear(5, 3)).opaque and not flora.LoRALinear(nn.Linear(5, 3)).opaque
    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = hooked(), nn.Linear(5, 3), nn.Linear(5, 3)
    flora.attach(parent, rank=2)
    assert parent.q_proj.shared is None and parent.k_proj.shared.layers == [parent.k_proj, parent.v_proj]

"""Whatever PEFT does with adapters after accelerate, the model gives what PEFT's own layers give, and says who computed it."""
import copy

import pytest
import torch
from oracles import llama, relative, tokens
from peft_models import Doubled, config, fill, layers, logits, model_of, passes
from tiny import Int8Linear
from torch import nn
from torch.nn.utils import parametrize

from flora.integrations.peft import AcceleratedLinear, accelerate, fallbacks, restore

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Adapter .* was active")
EVERY = 14


def same_as_peft(model):
    """Logits of the model as it is; asserts that PEFT's own layers give the same."""
    got, plain = logits(model), logits(restore(copy.deepcopy(model)))
    assert relative(got, plain) < 1e-6
    return got


def two_adapters():
    """A PEFT model in fp64, accelerated, that got a second adapter afterwards, of another rank and on other layers."""
    model = accelerate(model_of(dtype=torch.float64))
    model.add_adapter("second", config(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    return fill(model, seed=2)


def test_adapters_added_switched_and_deleted(calls):
    model = two_adapters()
    first = same_as_peft(model)
    assert calls == ["lora_linear"] * EVERY
    calls.clear()
    model.set_adapter("second")
    second = same_as_peft(model)
    assert len(calls) == 4 and relative(first, second) > 1e-3
    assert set(fallbacks(model).values()) == {"no active adapter has this layer"} and len(fallbacks(model)) == EVERY - 4
    model.set_adapter("default")
    assert torch.equal(same_as_peft(model), first)
    model.base_model.set_adapter(["default", "second"])
    calls.clear()
    both = same_as_peft(model)
    assert len(calls) == EVERY - 4 and relative(both, first) > 1e-3 and relative(both, second) > 1e-3
    assert list(fallbacks(model).values()) == ["several adapters are active"] * 4
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(same_as_peft(model), first) and fallbacks(model) == {}


def test_an_adapter_for_new_layers_is_accelerated_when_asked():
    model = accelerate(model_of(dtype=torch.float64, target_modules=["q_proj"]))
    model.add_adapter("second", config(target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    fill(model)
    assert {why.split(":")[0] for why in fallbacks(model).values()} == {"it is not accelerated"} and len(fallbacks(model)) == 2
    before = same_as_peft(model)
    assert fallbacks(accelerate(model)) == {} and relative(same_as_peft(model), before) < 1e-6


def test_disabled_merged_and_mixed(calls):
    model = two_adapters()
    first, base = logits(model), logits(_base(model))
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(same_as_peft(model), base)
        assert set(fallbacks(model).values()) == {"its adapters are disabled"}
    assert calls == []
    model.merge_adapter()
    assert relative(same_as_peft(model), first) < 1e-6 and calls == []
    assert set(fallbacks(model).values()) == {"an adapter is merged into its base"}
    with model.disable_adapter():                                      # PEFT unmerges on the way
        assert relative(same_as_peft(model), base) < 1e-6
    calls.clear()
    model.unmerge_adapter()
    assert relative(same_as_peft(model), first) < 1e-6 and len(calls) == EVERY
    calls.clear()
    model.eval()
    with torch.no_grad():
        mixed = model(tokens(), adapter_names=["second", "__base__"]).logits
    model.set_adapter("second")
    second = logits(model)
    assert relative(mixed[0], second[0]) < 1e-6 and relative(mixed[1], base[1]) < 1e-6 and len(calls) == 4


def _base(model):
    """The model without its adapters."""
    return copy.deepcopy(model).unload()


def test_unloading_and_merging_for_good():
    model = accelerate(model_of(dtype=torch.float64))
    expected = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative(logits(merged), expected) < 1e-6 and not layers(merged)
    assert relative(logits(model.unload()), expected) > 1e-3


def test_train_and_eval():
    model = accelerate(model_of(dtype=torch.float64, lora_dropout=0.5))
    quiet = same_as_peft(model.eval())
    assert relative(logits(model.train()), quiet) > 1e-3
    assert torch.equal(logits(model.eval()), quiet)


KINDS = {
    "use_dora": ({"use_dora": True}, "it is a variant of LoRA (DoraLinearVariant)"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["c_attn"]}, "lora_bias"),
    "bias": ({"bias": "lora_only", "target_modules": ["c_attn"]}, "its base trains too"),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_plain_lora_trains_as_peft_trains_it(calls, kind):
    from oracles import gpt2

    changes, why = KINDS[kind]
    model = model_of(gpt2 if "target_modules" in changes else llama, torch.float64, **changes)
    plain = passes(model)
    with pytest.warns(UserWarning, match="layers are computed by PEFT's own code: .* and \\d+ more|layers are computed by PEFT's"):
        accelerate(model)
    actual = passes(model)
    assert calls == [] and all(torch.equal(actual[n], plain[n]) for n in plain) and set(fallbacks(model).values()) == {why}
    assert len(actual) > 3


def change(layer, what):
    """Puts something in the way of one layer; gives why."""
    base = layer.base_layer
    if what == "hook on the base":
        base.register_forward_hook(lambda module, args, y: y + 1)
        return "its base has hooks or a forward of its own"
    if what == "forward of the base":
        base.__class__ = Doubled
        return "its base has hooks or a forward of its own"
    if what == "accelerate's hook on the base":
        from accelerate.hooks import SequentialHook, add_hook_to_module
        add_hook_to_module(base, SequentialHook())
        base.weight.data.mul_(2)
        return "its base has hooks or a forward of its own"
    if what == "hook on a factor":
        layer.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
        return "its factors have hooks"
    if what == "quantised":
        layer.base_layer = Int8Linear(base)
        return "its base is a Int8Linear"
    if what == "parametrised":
        parametrize.register_parametrization(base, "weight", Half())
        return "its base weight is computed (torch.nn.utils.parametrize)"
    if what == "another dropout":
        layer.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()
        return "its dropout is a AlphaDropout"
    if what == "another factor":
        layer.lora_B["default"].__class__ = Doubled
        return "its factors are not plain linear layers (Linear, Doubled)"
    if what == "no casting":
        layer.cast_input_dtype_enabled = False
        return "casting of its input is disabled"
    if what == "a tensor as scaling":
        layer.scaling["default"] = torch.tensor(0.25)
        return "its scaling is not a number"
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    return "its forward was replaced on the instance"


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


CHANGES = ("hook on the base", "accelerate's hook on the base", "forward of the base", "hook on a factor", "quantised",
           "parametrised", "another dropout", "another factor", "no casting", "a tensor as scaling", "forward of the layer")


@pytest.mark.parametrize("what", CHANGES)
def test_one_layer_that_is_not_flora_s(what):
    model = accelerate(model_of(dtype=torch.float64))
    before, name = logits(model), "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    plain = model_of(dtype=torch.float64)
    change(plain.get_submodule(f"base_model.model.{name}"), what)
    why = change(layer, what)
    assert type(layer) is AcceleratedLinear and fallbacks(model) == {name: why}
    assert relative(logits(model), logits(plain)) < 1e-6
    if what not in ("another dropout", "no casting"):
        assert relative(logits(model), before) > 1e-6

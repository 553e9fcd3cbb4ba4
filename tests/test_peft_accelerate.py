"""PEFT's layers computed by flora: numbers by the error rule, the objects that were there, PEFT's own code where it has to be."""
import copy
import io
import pickle

import pytest
import torch
from oracles import check, llama, relative, tokens
from peft_models import LAYERS, MODELS, config, in_double, layers, logits, model_of, passes, peft, trained
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flora.errors import TargetError
from flora.integrations.peft import AcceleratedLinear, accelerate, fallbacks, restore

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:`is_gradient_checkpointing`")


def obey(actual, plain, exact, dtype):
    """The rule for the logits, and for all gradients as one vector: a small one in a chain of layers has the error of its input."""
    flat = [torch.cat([g.flatten().double() for name, g in found.items() if name != "logits"]) for found in (actual, plain, exact)]
    check(actual["logits"], plain["logits"], exact["logits"], dtype, "logits")
    check(*flat, dtype, "gradients")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("upcast", [True, False], ids=["fp32 factors", "factors as the base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_and_gradients_are_pefts_by_the_error_rule(calls, kind, dtype, upcast):
    model = model_of(MODELS[kind], dtype, upcast)
    exact, plain = passes(in_double(model)), passes(model)
    assert calls == []
    actual = passes(accelerate(model))
    assert calls == ["lora_linear"] * LAYERS[kind] and fallbacks(model) == {}
    assert len(actual) == 1 + 2 * LAYERS[kind]
    obey(actual, plain, exact, dtype)


@pytest.mark.parametrize("upcast", [True, False], ids=["fp32 factors", "factors as the base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_alone_obeys_the_rule_to_the_gradient(kind, dtype, upcast):
    """Against PEFT with factors of the base's dtype, which is what the rule compares with."""
    ours, cast = layers(accelerate(model_of(MODELS[kind], dtype, upcast))), layers(model_of(MODELS[kind], dtype, upcast))
    for name, layer in ours.items():
        plain = cast[name].to(dtype)
        x, dy = torch.randn(5, layer.in_features).to(dtype), torch.randn(5, layer.out_features).to(dtype)
        results = []
        for module, kind_of in ((layer, dtype), (plain, dtype), (copy.deepcopy(plain).double(), torch.float64)):
            leaf = x.to(kind_of).detach().requires_grad_()
            factors = [module.lora_A["default"].weight, module.lora_B["default"].weight]
            y = module(leaf)
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *factors], dy.to(kind_of))])
        assert type(layer) is AcceleratedLinear and results[0][2].dtype == layer.lora_A["default"].weight.dtype
        for what, a, p, e in zip(("y", "dx", "dA", "dB"), *results, strict=True):
            check(a, p.to(a.dtype), e, dtype, f"{name} {what}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_too(calls, dtype):
    model = model_of(llama, dtype)
    exact = passes(in_double(model))
    with torch.autocast("cpu", torch.bfloat16):
        plain, actual = passes(model), passes(accelerate(model))
    assert len(calls) == LAYERS["llama"]
    obey(actual, plain, exact, torch.bfloat16)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 11}}],
                         ids=["rslora", "patterns"])
def test_every_layer_has_its_own_rank_and_scaling(calls, changes):
    model = model_of(llama, torch.float64, **changes)
    plain, actual = passes(model), passes(accelerate(model))
    assert len(calls) == LAYERS["llama"] and max(relative(actual[n], plain[n]) for n in plain) < 1e-6
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    assert relative(logits(model), logits(restore(model))) < 1e-6 < relative(logits(model), plain["logits"])


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_draws_the_mask_that_peft_draws(calls, kind):
    model = model_of(MODELS[kind], torch.float64, lora_dropout=0.4).train()
    plain, other = passes(model, seed=5), passes(model, seed=6)
    actual = passes(accelerate(model), seed=5)
    assert calls == ["lora_add_"] * LAYERS[kind] and fallbacks(model) == {}
    assert max(relative(actual[n], plain[n]) for n in plain) < 1e-6 < relative(other["logits"], plain["logits"])
    calls.clear()
    assert relative(logits(model.eval()), logits(restore(model))) < 1e-6 and calls == ["lora_linear"] * LAYERS[kind]


def test_dropout_of_16_bit_activations_obeys_the_rule():
    """The masks of PEFT's fp32 copy of the activations, and the products in bf16."""
    model = model_of(llama, torch.bfloat16, lora_dropout=0.4).train()
    plain = passes(model)
    exact_model = in_double(model)
    for layer in layers(exact_model).values():                         # in fp64 with the masks that are drawn in fp32
        layer.lora_dropout["default"].forward = lambda x: nn.functional.dropout(torch.ones_like(x).float(), 0.4).double() * x
    exact, actual = passes(exact_model), passes(accelerate(model))
    obey(actual, plain, exact, torch.bfloat16)


def test_objects_names_and_bytes_stay(tmp_path):
    model = model_of()
    before, state = dict(model.named_parameters()), {n: t.clone() for n, t in model.state_dict().items()}
    modules = [(name, id(m)) for name, m in model.named_modules()]
    optimizer, seen = torch.optim.SGD(trained(model).values(), 0.1), []
    hook = next(iter(layers(model).values())).register_forward_hook(lambda module, args, y: seen.append(module))
    model.save_pretrained(tmp_path / "before")
    assert accelerate(model) is model and accelerate(model) is model
    assert all(type(layer) is AcceleratedLinear for layer in layers(model).values())
    model.save_pretrained(tmp_path / "accelerated")
    assert restore(copy.deepcopy(model)) is not model and type(next(iter(layers(model).values()))) is AcceleratedLinear
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "accelerated" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    passes(model)
    assert seen == [next(iter(layers(model).values()))]                # a hook fires once a call
    hook.remove()
    optimizer.step()
    assert all(not torch.equal(p, state[name]) for name, p in trained(model).items())
    for name, p in model.named_parameters():
        assert p is before[name]
    assert list(model.state_dict()) == list(state) and [(name, id(m)) for name, m in model.named_modules()] == modules
    with_names = {name: set(m.__dict__) for name, m in model.named_modules()}
    assert restore(model) is model and all(type(m) is peft.tuners.lora.Linear for m in layers(model).values())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == with_names


def test_what_was_saved_goes_on_after_it_is_loaded(tmp_path):
    model = accelerate(model_of())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = accelerate(peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    first, second = passes(model), passes(again)
    assert list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def test_copies_and_pickles_stay_accelerated(calls):
    model = accelerate(model_of())
    expected, file = passes(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        calls.clear()
        got = passes(other)
        assert len(calls) == LAYERS["llama"] and all(torch.equal(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_whole_it_gives_the_same(dropout):
    torch._dynamo.reset()
    model = accelerate(model_of(lambda dtype: llama(dtype, num_hidden_layers=1), lora_dropout=dropout).train())
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    eager = passes(model, seed=3)
    compiled = passes(torch.compile(model, fullgraph=True, backend=backend), seed=3)
    assert sum("_LoRA" in node or "autograd_function_apply" in node for node in nodes) == 7
    assert max(relative(compiled[n], eager[n]) for n in eager) < 1e-6


def test_a_layer_that_ran_in_inference_mode_trains_later():
    model = accelerate(model_of(alpha_pattern={"q_proj": 7.25}))       # a scaling that no other test has
    with torch.inference_mode():
        model(tokens())
    assert all(bool(g.any()) for g in passes(model).values())


def test_a_layer_that_ran_under_fake_tensors_runs_later():
    layer = next(iter(layers(accelerate(model_of(alpha_pattern={"q_proj": 7.125}))).values()))
    x = torch.randn(3, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(x).shape == (3, 16)
    assert type(layer(x)) is torch.Tensor


def test_what_autograd_functions_cannot_is_pefts(calls):
    """Functorch, forward mode and the second derivative's error; a dtype that PEFT refuses stays refused."""
    layer = next(iter(layers(accelerate(model_of())).values()))
    x, plain = torch.randn(3, 16), copy.deepcopy(layer)
    plain.__class__ = peft.tuners.lora.Linear
    jacobian = torch.func.jacrev(layer)(x[0])
    assert relative(jacobian, torch.func.jacrev(plain)(x[0])) < 1e-6
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    assert relative(tangent, torch.ones_like(x) @ jacobian.T) < 1e-5
    with torch.autograd.forward_ad.dual_level():
        assert layer(torch.autograd.forward_ad.make_dual(x, x)) is not None
    assert calls == []
    for one in (layer, plain):
        with pytest.raises(RuntimeError, match="same dtype"):
            one(x.to(torch.bfloat16))


def test_other_layers_are_named_and_left():
    model = peft.get_peft_model(llama(tie_word_embeddings=False), config(target_modules=["q_proj", "embed_tokens"]))
    with pytest.warns(UserWarning, match="1 of 3 layers are .* PEFT's own code: it is a lora.layer.Embedding.*: model.embed"):
        accelerate(model)
    assert list(fallbacks(model)) == ["model.embed_tokens"]
    assert relative(logits(model), logits(restore(model))) < 1e-6
    assert set(fallbacks(model)) == {"model.embed_tokens", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))}


def test_models_without_lora_are_refused():
    ia3 = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]))
    for model in (llama(), nn.Linear(3, 3), ia3):
        with pytest.raises(TargetError, match="PEFT's LoRA layers; found none"):
            accelerate(model)

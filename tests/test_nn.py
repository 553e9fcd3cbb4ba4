"""The verbs on real models: attach, adapters, load_adapters, merge, detach leave exactly what they promise."""
import copy

import pytest
import torch
from oracles import adapter, check, gpt2, llama, randomise, relative, tokens
from torch import nn

import flora
from flora.adapter import Adapter
from flora.errors import TargetError
from flora.layer import LoRALinear
from flora.nn import applied, lora_layers, target_shapes

MODELS = {"llama": llama, "gpt2": gpt2}


def tree(dtype=torch.float32):
    """A model of no library: blocks in a list, a linear module beside them."""
    blocks = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 8))
    model.add_module("blocks", nn.Sequential(*blocks))
    return model.to(dtype)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_attach_starts_at_the_base_and_detach_gives_it_back(make):
    model = make()
    before, modules, start = state(model), dict(model.named_modules()), logits(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert flora.attach(model, rank=4, alpha=8) is model
    assert torch.equal(logits(model), start)                          # B = 0
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    randomise(model)
    assert not torch.equal(logits(model), start)
    assert flora.detach(model) is model
    assert same(state(model), before) and torch.equal(logits(model), start)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert not hasattr(model, "_flora_required_grad") and flora.detach(model) is model


def test_detach_leaves_frozen_what_was_frozen():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    flora.detach(flora.attach(model))
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_merge_writes_what_was_attached(make, dtype):
    """The delta's orientation too: GPT-2 stores weights transposed, and its c_proj is square."""
    model = make(dtype)
    drawn = randomise(flora.attach(model, rank=3, alpha=6))
    assert {a.A.dtype for a in drawn.values()} == {torch.float32}     # fp32 adapters on a base of any dtype
    attached = logits(model)
    before = state(flora.detach(model))
    exact_model, plain_model = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert flora.merge(model, drawn) is model
    for name, a in drawn.items():
        weight = before[f"{name}.weight"]
        delta = a.delta().T if make is gpt2 else a.delta()
        exact_model.get_submodule(name).weight.data += delta
        plain_model.get_submodule(name).weight.data += delta.to(dtype)
        plain, exact = (m.get_submodule(name).weight.detach() for m in (plain_model, exact_model))
        check(model.get_submodule(name).weight.detach(), plain, exact, what=name)
        assert relative(exact, weight.double()) > 0.01
    changed = {f"{name}.weight" for name in drawn}
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == changed - {"lm_head.weight"}
    for got in (attached, logits(model)):
        check(got, logits(plain_model), logits(exact_model), what="logits")
    assert any(a.shape[0] == a.shape[1] for a in drawn.values())


def test_merge_leaves_attached_adapters_as_they_are():
    model = llama(torch.float64)
    start = logits(model)
    drawn = randomise(flora.attach(model, rank=3))
    flora.merge(model, {name: a * -1 for name, a in drawn.items()})
    assert relative(logits(model), start) <= 1e-6
    assert all(torch.equal(a.B, drawn[name].B) for name, a in flora.adapters(model).items())


def test_merging_a_stack_is_merging_its_parts():
    model, parts = tree(torch.float64), [{"first": adapter(8, 6, r) * p} for r, p in ((1, 0.25), (6, 0.5), (3, 0.25))]
    before = state(model)["first.weight"]
    flora.merge(model, {"first": flora.stack([each["first"] for each in parts])})
    exact = before + sum(each["first"].delta() for each in parts)
    assert relative(model.first.weight, exact) <= 1e-6


REFUSED = {
    "an unknown layer": ("nowhere", (8, 6)), "another shape": ("blocks.0.0", (8, 6)), "transposed": ("first", (6, 8)),
    "no linear module": ("blocks.0.1", (8, 8)), "a container": ("blocks.0", (8, 8)),
    "the inside of a layer": ("first.base", (8, 6)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("attached", [False, True])
def test_a_refused_merge_changes_nothing(name, attached):
    model = tree()
    if attached:
        flora.attach(model, rank=2)
    before, (layer, shape) = state(model), REFUSED[name]
    good = {"first": adapter(8, 6, 2), "blocks.1.0": adapter(8, 8, 2)}
    with pytest.raises(TargetError, match="expected"):
        flora.merge(model, {**good, layer: adapter(*shape, 2)})
    with pytest.raises(TargetError, match="expected|attached"), applied(model, {**good, layer: adapter(*shape, 2)}):
        raise AssertionError("entered")
    assert same(state(model), before) and (len(lora_layers(model)) == 5 * attached)


def test_tied_weights_are_refused_and_named():
    model = llama()
    before = state(model)
    for act in (lambda: flora.attach(model, targets=["lm_head"]), lambda: flora.attach(model, targets=["q_proj", "lm_head"]),
                lambda: flora.merge(model, {"lm_head": adapter(61, 16, 2)})):
        with pytest.raises(TargetError, match="lm_head shares its weight with model.embed_tokens"):
            act()
    assert same(state(model), before) and not lora_layers(model)
    flora.attach(llama(tie_word_embeddings=False), targets=["lm_head"])
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twins[1].weight = twins[0].weight
    with pytest.raises(TargetError, match="0 shares its weight with 1"):
        flora.attach(twins)


def test_a_module_under_two_names_is_one_layer_with_one_adapter():
    """As in ALBERT, whose blocks are one block."""
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    flora.attach(model, rank=2)
    assert list(flora.adapters(model)) == ["0"] and model[0] is model[2] and isinstance(model[0], LoRALinear)
    a, x = randomise(model)["0"], torch.randn(3, 5)
    y = model(x)
    y.sum().backward()
    assert model[0].A.grad.any()
    flora.detach(model)
    assert model[0] is shared and model[2] is shared
    flora.merge(model, {"0": a})
    assert relative(model(x), y) <= 1e-6


@pytest.mark.parametrize("make", [*MODELS.values(), lambda: llama(tie_word_embeddings=False)], ids=[*MODELS, "untied"])
def test_all_linear_is_pefts_choice(make):
    peft = pytest.importorskip("peft", reason="peft is not installed: its choice of modules was not compared")
    ours = target_shapes(make())
    assert "lm_head" not in ours
    theirs = peft.get_peft_model(make(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert list(ours) == names
    model = make()
    for name, shape in ours.items():
        weight = model.get_submodule(name).weight
        assert shape == tuple(weight.T.shape if make is gpt2 else weight.shape)
    assert target_shapes(flora.attach(model)) == ours                 # the same with adapters attached


def test_all_linear_leaves_out_a_classification_head():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert "score" not in target_shapes(LlamaForSequenceClassification(LlamaConfig(**sizes)))


def test_targets_by_last_part_by_name_and_by_layer():
    model = llama()
    attention = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in ("q", "v")]
    assert list(target_shapes(model, ("q_proj", "v_proj"))) == attention
    assert list(target_shapes(model, "q_proj")) == attention[::2]
    assert list(target_shapes(model, [attention[3], "self_attn.q_proj"])) == [attention[0], attention[2], attention[3]]
    assert list(target_shapes(model, ("q_proj", "v_proj"), layers=[1])) == attention[2:]
    assert all(".layers.0." in name for name in target_shapes(model, layers=[0])) and len(target_shapes(model, layers=[0])) == 7
    assert list(target_shapes(tree(), layers=(1,))) == ["blocks.1.0", "blocks.1.2"]
    assert list(target_shapes(tree(), "first")) == ["first"]
    flora.attach(model, targets=("q_proj",), layers=[1])
    assert list(flora.adapters(model)) == [attention[2]]


def test_targets_that_do_not_exist_list_those_that_do():
    for targets in ("proj", ["q_proj", "query"], ["elf_attn.q_proj"], "embed_tokens", "model.layers.7.self_attn.q_proj"):
        with pytest.raises(TargetError, match="no linear module is named .*down_proj, gate_proj, k_proj, lm_head, o_proj"):
            flora.attach(llama(), targets=targets)
    with pytest.raises(TargetError, match=r"layers=\[5\]; found none.*blocks: \[0, 1\]"):
        flora.attach(llama(), layers=[5])
    for targets in ([], ()):
        with pytest.raises(TargetError, match="at least one layer"):
            flora.attach(llama(), targets=targets)
    with pytest.raises(TargetError, match="none"):
        flora.attach(nn.Sequential(nn.Embedding(3, 3)))
    with pytest.raises(TargetError, match="itself one linear module"):
        flora.attach(nn.Linear(3, 3))


def test_an_encoder_layer_that_reads_its_weights_is_refused():
    """In eval mode its fast path would pass by the adapter without a word."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 8))
    with pytest.raises(TargetError, match="0.linear1: nn.TransformerEncoderLayer reads this weight"):
        flora.attach(model)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert list(flora.adapters(flora.attach(model, targets=["1"]))) == ["1"]


def test_what_is_attached_is_not_attached_twice():
    model = flora.attach(llama(), rank=2)
    drawn = randomise(model)
    for act in (lambda: flora.attach(model), lambda: applied(model, drawn).__enter__()):
        with pytest.raises(TargetError, match="attached to this model already. Call flora.detach"):
            act()
    assert all(torch.equal(a.B, drawn[name].B) for name, a in flora.adapters(model).items())
    with pytest.raises(TargetError, match="no adapters are attached"):
        flora.adapters(flora.detach(model))


def test_load_adapters_takes_other_ranks_and_checks_all_before_one():
    model = flora.attach(tree(), rank=4, alpha=8)
    drawn, parameter = randomise(model), model.first.A
    same_rank = {name: Adapter(a.A + 1, a.B, a.scale * 0.3) for name, a in drawn.items()}
    flora.load_adapters(model, same_rank)
    assert model.first.A is parameter and torch.equal(parameter.detach(), drawn["first"].A + 1)       # an optimiser keeps its grip
    other = {name: adapter(*a.shape, r) for (name, a), r in zip(drawn.items(), (1, 9, 2, 6, 3), strict=True)}
    other["blocks.1.0"] = other["blocks.1.0"].to(torch.bfloat16)
    model.first.A.requires_grad_(False)
    flora.load_adapters(model, other)
    got = flora.adapters(model)
    for name, a in other.items():
        assert torch.equal(got[name].A, a.A.float()) and torch.equal(got[name].B, a.B.float())
        assert torch.equal(got[name].scale, a.scale)
    assert not model.first.A.requires_grad and model.first.B.requires_grad
    model(torch.randn(2, 6)).sum().backward()
    before = state(model)
    for wrong in ({}, {**other, "more": other["first"]}, {n: a for n, a in other.items() if n != "first"},
                  {**other, "blocks.1.2": adapter(8, 6, 2)}):
        with pytest.raises(TargetError, match="expected"):
            flora.load_adapters(model, wrong)
        assert same(state(model), before)
    got["first"].A.zero_(), other["first"].A.zero_()
    assert same(state(model), before)                                  # what is given out and taken in is a copy

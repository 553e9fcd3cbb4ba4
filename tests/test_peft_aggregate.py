"""Adapters of PEFT in, one adapter of PEFT out, whose ΔW is the strategy's result; what cannot be combined is refused by name."""
import copy
import re
from fractions import Fraction

import pytest
import torch
from oracles import llama, relative
from peft_models import MODELS, config, layers, logits, model_of, peft

import flora
from flora import STRATEGIES, Adapter, Update
from flora.errors import AdapterError, FloraError, StrategyError
from flora.formats import adapters_of, load_peft, save_peft
from flora.integrations.peft import aggregate
from flora.nn import applied

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:Already found")
MIXED = ({"r": 4, "lora_alpha": 6}, {"r": 2, "lora_alpha": 7, "use_rslora": True},
         {"r": 5, "lora_alpha": 3, "rank_pattern": {"q_proj": 3, "c_fc": 1}, "alpha_pattern": {"v_proj": 11, "attn.c_proj": 2}})
WEIGHTS = (30, 10, 60)
USABLE = [name for name, s in STRATEGIES.items() if not s.home and not s.dense]


def clients(make=llama, settings=MIXED):
    """(state dicts, configs): what PEFT itself gives of clients of these settings, every factor random."""
    states, configs = [], []
    for k, changes in enumerate(settings):
        model = peft.get_peft_model(make(), config(**changes))
        draw = torch.Generator().manual_seed(k)
        for layer in layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                weight = factor["default"].weight
                weight.data.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
        states.append(peft.get_peft_model_state_dict(model))
        configs.append(model.peft_config["default"])
    return states, configs


def read(state, setting):
    return adapters_of(state, setting.to_dict(), "what came")


def loaded(made, make=llama):
    """A PEFT model in fp64 with the aggregate, loaded as PEFT loads it."""
    state, setting = made
    torch.manual_seed(0)
    model = peft.get_peft_model(make(torch.float64), setting)
    found = peft.set_peft_model_state_dict(model, state)
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora" in key]
    return model.double().eval()


@pytest.mark.parametrize("kind", MODELS)
def test_flora_is_pefts_own_cat(kind):
    """add_weighted_adapter(combination_type="cat") is exact for plain LoRA: ranks, alphas, rsLoRA and patterns of three clients."""
    states, configs = clients(MODELS[kind])
    torch.manual_seed(0)
    peers = peft.get_peft_model(MODELS[kind](torch.float64), configs[0], "c0")
    for k in (1, 2):
        peers.add_adapter(f"c{k}", configs[k])
    for k, state in enumerate(states):
        peft.set_peft_model_state_dict(peers, state, f"c{k}")
    peers.double().base_model.add_weighted_adapter(["c0", "c1", "c2"], [0.3, 0.1, 0.6], "sum", combination_type="cat")
    peers.base_model.set_adapter("sum")
    model = loaded(aggregate(states, WEIGHTS, configs), MODELS[kind])
    for (name, layer), peer in zip(layers(model).items(), layers(peers).values(), strict=True):
        assert relative(layer.get_delta_weight("default"), peer.get_delta_weight("sum")) < 1e-6, name
        assert layer.r["default"] == sum(peer.r[f"c{k}"] for k in range(3))
    assert relative(logits(model), logits(peers)) < 1e-6


@pytest.mark.parametrize("strategy", USABLE)
def test_every_strategy_gives_its_result_as_one_adapter(strategy):
    """base + merge + start, as flora applies them, and the loaded adapter: the same ΔW and logits."""
    states, configs = clients(settings=({"r": 4, "lora_alpha": 6},) * 3)
    factor = "lora_B" if strategy == "fedsb" else "lora_A"
    for state in states[1:]:                                           # one A (or B) for all, as ffa and its like ask
        state.update({key: states[0][key].clone() for key in state if factor in key})
    updates = [Update(read(s, c), w) for s, c, w in zip(states, configs, WEIGHTS, strict=True)]
    sent = flora.aggregate(updates, strategy)
    torch.manual_seed(0)
    base = llama(torch.float64)
    model = loaded(aggregate(states, WEIGHTS, configs, strategy))
    flora.merge(base, sent.merge or {})
    with applied(base, sent.start or {}, dtype=torch.float64) if sent.start else torch.no_grad():
        expected = logits(base)
    assert relative(logits(model), expected) < 1e-6
    nothing = model_of(llama, torch.float64)
    assert relative(logits(nothing.unload()), expected) > 1e-3


def test_a_strategy_that_trains_in_turn_takes_the_factor_that_trained():
    states, configs = clients(settings=({"r": 4, "lora_alpha": 6},) * 2)
    states[1].update({key: states[0][key].clone() for key in states[0] if "lora_B" in key})
    made = read(*aggregate(states, [1, 3], configs, "rolora"))
    for name, a in made.items():
        ours = [read(s, c)[name] for s, c in zip(states, configs, strict=True)]
        assert torch.equal(a.B, ours[0].B) and relative(a.delta(), ours[0].delta() / 4 + ours[1].delta() * 0.75) < 1e-6


def test_keys_come_with_the_adapters_name_or_without_with_the_prefix_or_without():
    states, configs = clients()
    expected = aggregate(states, WEIGHTS, configs)
    assert list(expected[0]) == list(states[0]) and not any("default" in key for key in expected[0])
    named = [{re.sub(r"(lora_[AB])", rf"\1.{name}", key): t for key, t in state.items()}
             for name, state in zip(("default", "mine", "3"), states, strict=True)]
    bare = [{key.removeprefix("base_model.model."): t for key, t in state.items()} for state in states]
    for some, shortened in ((named, 0), (bare, 1), ([named[0], bare[1], states[2]], 0)):
        state, setting = aggregate(some, WEIGHTS, [c.to_dict() for c in configs])
        assert list(state) == [key.removeprefix("base_model.model.") if shortened else key for key in expected[0]]
        assert all(torch.equal(a, b) for a, b in zip(state.values(), expected[0].values(), strict=True))
        assert setting == expected[1]
    base = llama()
    peft.inject_adapter_in_model(aggregate(bare, WEIGHTS, configs)[1], base)
    assert not peft.set_peft_model_state_dict(base, aggregate(bare, WEIGHTS, configs)[0]).unexpected_keys


def test_it_is_pure_and_keeps_order_bits_and_configuration(tmp_path):
    states, configs = clients(settings=({"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},) * 2)
    states = [{key: t.requires_grad_() for key, t in reversed(state.items())} for state in states]
    before, settings = copy.deepcopy(states), copy.deepcopy(configs)
    first, second = aggregate(states, [1, 1], configs, "fedit"), aggregate(states, [1, 1], configs, "fedit")
    assert list(first[0]) == list(second[0]) and all(torch.equal(first[0][k], second[0][k]) for k in first[0])
    assert [key.partition(".lora")[0] for key in first[0]] == [key.partition(".lora")[0] for key in states[0]]
    for strategy in USABLE:
        shared = [states[0], states[0]]
        for t in aggregate(shared, [1, 1], configs, strategy)[0].values():
            assert not t.requires_grad
            t.zero_()                                                  # nothing of the clients' is handed out
    assert all(torch.equal(t, before[k][key]) for k, state in enumerate(states) for key, t in state.items())
    assert configs == settings
    setting = first[1]
    assert (setting.r, setting.lora_alpha, setting.lora_dropout, setting.task_type) == (3, 6, 0.1, "CAUSAL_LM")
    assert setting.rank_pattern == {} and not setting.inference_mode
    peft.PeftModel(llama(), setting).save_pretrained(tmp_path)         # which PEFT can write and read
    assert peft.LoraConfig.from_pretrained(tmp_path).lora_alpha == 6


@pytest.mark.parametrize("weights", [(3, 1), (0.75, 0.25), (Fraction(3, 4), Fraction(1, 4)), torch.tensor([3.0, 1.0]),
                                     (3e300, 1e300)], ids=["examples", "shares", "fractions", "tensor", "huge"])
def test_weights_are_shares_in_any_unit(weights):
    states, configs = clients(settings=MIXED[:2])
    expected, made = aggregate(states, [3, 1], configs), aggregate(states, weights, configs)
    assert made[1] == expected[1] and all(torch.equal(made[0][key], expected[0][key]) for key in expected[0])


def test_who_weighs_nothing_is_left_out():
    states, configs = clients()
    made, expected = aggregate(states, [1, 0, 3], configs), aggregate(states[::2], [1, 3], configs[::2])
    assert all(torch.equal(made[0][key], expected[0][key]) for key in expected[0]) and made[1] == expected[1]


def test_one_configuration_serves_all():
    states, configs = clients(settings=MIXED[:1] * 2)
    for one in (configs[0], configs[0].to_dict(), configs):
        assert list(aggregate(states, [1, 1], one)[0]) == list(states[0])


def test_a_layer_that_a_client_lacks_is_no_change_or_refused():
    states, configs = clients(settings=({"r": 2}, {"r": 2, "target_modules": ["q_proj", "k_proj"]}))
    made = read(*aggregate(states, [1, 3], configs))
    name = "model.layers.1.mlp.up_proj"
    assert relative(made[name].delta(), read(states[0], configs[0])[name].delta() / 4) < 1e-6 and made[name].rank == 2
    assert made["model.layers.1.self_attn.q_proj"].rank == 4 and len(made) == 14
    with pytest.raises(StrategyError, match=r"fedit.*client number 1 lacks model.layers.0.self_attn.v_proj, .* and 7 more\. Use"):
        aggregate(states, [1, 1], configs, "fedit")


def test_layers_of_zeros_keep_their_place_and_can_train():
    states, configs = clients(settings=MIXED[:1] * 2)
    for state in states:
        state.update({key: torch.zeros_like(t) for key, t in state.items() if "lora_B" in key and "q_proj" in key})
    for strategy in ("flexlora", "florist", "flora"):
        made = read(*aggregate(states, [1, 1], configs, strategy))
        assert len(made) == 14
        for name, a in made.items():
            assert bool(a.A.any()) and bool(a.B.any()) != ("q_proj" in name)


def test_what_keeps_its_factors_or_has_none_is_refused():
    states, configs = clients(settings=MIXED[:1])
    for name, why in (("fedsa", "keeps B at every client"), ("standalone", "keeps A and B"), ("full", "averages whole weights")):
        with pytest.raises(StrategyError, match=why):
            aggregate(states, [1], configs, name)
    with pytest.raises(StrategyError, match="Did you mean 'flora'"):
        aggregate(states, [1], configs, "flroa")


def test_what_a_strategy_refuses_stays_refused():
    states, configs = clients(settings=MIXED[:2])
    with pytest.raises(StrategyError, match="expected clients of one rank; got ranks"):
        aggregate(states, [1, 1], configs, "fedit")
    states, configs = clients(settings=({"r": 2, "lora_alpha": 2}, {"r": 2, "lora_alpha": 3}))
    with pytest.raises(StrategyError, match="expected one scale"):
        aggregate(states, [1, 1], configs, "fedit")
    with pytest.raises(StrategyError, match="expected one A"):
        aggregate(states, [1, 1], configs[0], "ffa")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "DoRA": ({f"{Q}.lora_magnitude_vector": torch.ones(16)}, {}, "client number 1: expected lora_A and lora_B .*magnitude_vector"),
    "a base weight": ({f"{Q}.base_layer.weight": torch.ones(16, 16)}, {}, "client number 1: .* got .*base_layer.weight"),
    "lora_bias": ({f"{Q}.lora_B.bias": torch.ones(16)}, {}, "client number 1: .* got .*lora_B.bias"),
    "wrapped": ({f"module.{Q}.lora_A.weight": torch.ones(2, 16)}, {}, "client number 1: .* got module.base_model"),
    "two adapters": ({f"{Q}.lora_A.other.weight": torch.ones(2, 16)}, {}, "client number 1: expected the keys of one adapter"),
    "half a pair": ({f"{Q}.lora_B.weight": None}, {}, "client number 1: expected lora_A and lora_B of .*q_proj; got only lora_A"),
    "another in": ({f"{Q}.lora_A.weight": torch.ones(2, 7)}, {}, r"number 1, .*q_proj: expected an adapter for .* = \(16, 16\)"),
    "two ranks": ({f"{Q}.lora_A.weight": torch.ones(3, 16)}, {}, "client number 1, .*q_proj: expected A .rank, in. and B"),
    "a convolution": ({f"{Q}.lora_A.weight": torch.ones(2, 16, 1, 1)}, {}, "number 1, .*q_proj: expected A .rank, in. and B"),
    "NaN": ({f"{Q}.lora_A.weight": torch.full((2, 16), torch.nan)}, {}, "number 1, .*q_proj: expected finite numbers"),
    "another rank": ({}, {"r": 4}, "client number 1, .*: expected a rank of 4, as r and rank_pattern say; got 2"),
    "use_dora": ({}, {"use_dora": True}, "client number 1: expected plain LoRA; got use_dora"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "client number 1: expected plain LoRA; got init_lora_weights='pissa'"),
    "no LoRA": ({}, {"peft_type": "IA3"}, "client number 1: expected the configuration of a LoRA adapter"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_plain_lora_is_refused_by_client_and_name(what):
    tensors, changes, match = BROKEN[what]
    states, configs = clients(settings=({"r": 2},) * 2)
    states[1] = {key: t for key, t in {**states[1], **tensors}.items() if t is not None}
    with pytest.raises(FloraError, match=match):
        aggregate(states, [1, 1], [configs[0], {**configs[1].to_dict(), **changes}])


@pytest.mark.parametrize(("weights", "match"), [
    ([1], "one weight for each of 2"), ([1, 2, 3], "one weight for each of 2"), ([1, -1], "finite weights >= 0"),
    ([1, float("nan")], "finite weights >= 0"), ([1, float("inf")], "finite"), ([0, 0], "positive sum"),
    ([1, "many"], "a number a client"), ([1, None], "a number a client"), (None, "a number a client"),
    ([1e308, 1e308], "finite")], ids=str)
def test_weights_that_are_none_are_refused(weights, match):
    states, configs = clients(settings=({"r": 2},) * 2)
    with pytest.raises(StrategyError, match=match):
        aggregate(states, weights, configs)


def test_empty_lists_and_missing_configurations_are_refused():
    states, configs = clients(settings=({"r": 2},) * 2)
    for call, error, match in ((([], [], []), StrategyError, "at least one state dict"),
                               ((states, [1, 1], configs[:1]), StrategyError, "one configuration, or one for each of 2"),
                               ((states, [1, 1], None), AdapterError, "client number 0: expected the configuration"),
                               (([states[0], {}], [1, 1], configs), AdapterError, "client number 1: .* empty")):
        with pytest.raises(error, match=match):
            aggregate(*call)


def test_a_loop_goes_on_from_what_was_compressed(tmp_path):
    """Aggregate, compress to a client's rank, save, load into PEFT: the best approximation of the sum."""
    states, configs = clients(settings=MIXED[:2])
    whole = read(*aggregate(states, [1, 1], configs))
    small = load_peft(save_peft({name: flora.compress(a, 4) for name, a in whole.items()}, tmp_path))
    assert all(a.rank == 4 and isinstance(a, Adapter) for a in small.values())
    for name, a in whole.items():
        best = torch.linalg.svdvals(a.delta())[4:].norm()
        assert float((small[name].delta() - a.delta()).norm()) <= float(best) * 1.001 + 1e-6

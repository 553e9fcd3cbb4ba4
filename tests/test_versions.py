"""A base changes once per run and version, in every way a broadcast can change it; and what a client that missed rounds is sent."""
import copy

import pytest
import torch
from oracles import relative
from tiny import TARGETS, Int8Linear, adapter, dense, llama, quantise, token_rows

import flora
from flora import nn
from flora.adapter import norm, stack
from flora.errors import AdapterError, ConfigError, RunError, TargetError
from flora.messages import Broadcast, decode, encode
from flora.versions import MergeConfig, bring_to, version_of

LAYERS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.down_proj": (16, 24)}


def merges(seed, rank=2, size=1.0):
    return {name: adapter(rank, shape, seed) * size for name, shape in LAYERS.items()}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("how", [MergeConfig(), MergeConfig(rounding="stochastic", seed=3), MergeConfig(residual=True),
                                 MergeConfig(into="adapter")], ids=str)
def test_a_broadcast_applied_twice_is_applied_once(how):
    model = llama(dtype=torch.bfloat16)
    for version in (1, 2):
        broadcast = Broadcast(merge=merges(version, size=0.01), version=version, run="r")
        assert bring_to(model, broadcast, how) and version_of(model, "r") == version
        once = state(model)
        left = {name: t.clone() for name, t in nn.residuals(model).items()}
        assert not bring_to(model, broadcast, how) and not bring_to(model, decode(encode(broadcast)), how)
        assert all(torch.equal(t, once[name]) for name, t in model.state_dict().items())
        assert all(torch.equal(t, left[name]) for name, t in nn.residuals(model).items()) and bool(left) == how.residual


def test_stochastic_merges_depend_on_seed_version_and_layer_alone():
    def merged(seed=0, run="r", version=1, names=tuple(LAYERS)):
        model = llama(dtype=torch.bfloat16)
        bring_to(model, Broadcast(merge={n: merges(1, size=0.01)[n] for n in names}, version=version, run=run, since=0),
                 MergeConfig(rounding="stochastic", seed=seed))
        return model.get_submodule(names[0]).weight

    names = tuple(LAYERS)
    assert torch.equal(merged(), merged()) and torch.equal(merged(), merged(names=names[:1]))
    assert torch.equal(merged(), merged(run="s"))
    assert not torch.equal(merged(), merged(seed=1)) and not torch.equal(merged(), merged(version=2))


def test_the_residual_of_a_model_makes_hundreds_of_merges_exact():
    models = {residual: llama(dtype=torch.bfloat16) for residual in (False, True)}
    name, shape = next(iter(LAYERS.items()))
    exact = models[True].get_submodule(name).weight.double()
    start, a = exact.clone(), adapter(3, shape)
    a = a * float(2e-4 * exact.norm() / dense(a).norm())
    for residual, model in models.items():
        for _ in range(200):
            flora.merge(model, {name: a}, residual=residual)
    exact = exact + 200 * dense(a)
    got = {residual: model.get_submodule(name).weight.double() for residual, model in models.items()}
    left = nn.residuals(models[True])[name]
    assert left.dtype == torch.bfloat16 and left.shape == shape and not nn.residuals(models[False])
    assert float((got[True] + left.double() - exact).norm()) < 0.02 * float((exact - start).norm())
    assert float((got[False] - exact).norm()) > 0.5 * float((exact - start).norm())


def test_residuals_are_for_16_bits_alone():
    model = llama()
    flora.merge(model, merges(1), residual=True)
    assert not nn.residuals(model)


def test_several_parties_merge_as_their_stack():
    one, two, parties = llama(dtype=torch.float64), llama(dtype=torch.float64), [merges(s, r) for s, r in ((1, 2), (2, 5), (3, 1))]
    del parties[1][next(iter(LAYERS))]
    flora.merge(one, parties)
    flora.merge(two, {n: stack([p[n] for p in parties if n in p]) for n in LAYERS})
    assert all(relative(a, b) < 1e-9 for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_nan_in_one_layer_leaves_the_model_as_it_was():
    for verb in (flora.merge, nn.accumulate):
        model = llama()
        before, broken = state(model), merges(1)
        broken["model.layers.1.mlp.down_proj"].B[3, 1] = float("nan")
        with pytest.raises(AdapterError, match="expected finite numbers; got NaN"):
            verb(model, broken)
        assert same_state(model, before)


def same_state(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[n], t) for n, t in before.items())


@pytest.mark.parametrize("int8", [True, False])
def test_an_update_beside_the_base_is_the_update_in_the_base(int8):
    """Rounds of it, on an int8 model and on a plain one; attached, trained and evaluated like any other; the base untouched."""
    base = quantise(llama(dtype=torch.float64)) if int8 else llama(dtype=torch.float64)
    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    for module in list(plain.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Int8Linear):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = (child.weight * child.step).double()
                module._modules[name] = linear
    for version in (1, 2, 3):
        broadcast = Broadcast(merge=merges(version), version=version, run="r")
        assert bring_to(model, broadcast, MergeConfig(into="adapter")) and bring_to(plain, broadcast)
    assert relative(logits(model), logits(plain)) < 1e-6 and relative(logits(model), logits(base)) > 1e-2
    kept = nn.accumulated(model)
    assert {n: a.rank for n, a in kept.items()} == dict.fromkeys(LAYERS, 6) and not nn.accumulated(plain)
    with flora.nn.applied(model, merges(4)), flora.nn.applied(plain, merges(4)):
        assert relative(logits(model), logits(plain)) < 1e-6
    assert relative(logits(model), logits(plain)) < 1e-6
    config = flora.TrainConfig(1e-3, max_steps=2, per_device_train_batch_size=2)
    updates = []
    for one in (model, plain):
        clients = [flora.LocalClient("a", token_rows(4), rank=3, alpha=6)]
        updates += flora.Cohort(one, clients, config, list(TARGETS)).fit(Broadcast(version=3, run="r"))
    assert all(relative(dense(updates[0].adapters[n]), dense(updates[1].adapters[n])) < 1e-3 for n in LAYERS)
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").base.weight
    assert torch.equal(weight, base.get_submodule("model.layers.0.self_attn.q_proj").weight)


def test_what_is_kept_is_compressed_and_the_error_reported():
    model = quantise(llama())
    exact = {name: torch.zeros(shape).double() for name, shape in LAYERS.items()}
    for seed in range(12):
        errors = nn.accumulate(model, merges(seed), rank=6)
        whole = {name: dense(a) for name, a in nn.accumulated(model).items()}
        exact = {name: total + dense(merges(seed)[name]) for name, total in exact.items()}
        for name in LAYERS:
            assert nn.accumulated(model)[name].rank <= 6
            assert (errors[name] == 0) == (seed < 3)
            if seed == 3:
                assert abs(errors[name] - relative(whole[name], exact[name])) < 1e-4
    errors = nn.accumulate(model, merges(20), tol=0.3)
    assert all(0 < e <= 0.3 for e in errors.values())
    a = merges(3)[next(iter(LAYERS))]
    assert abs(norm(a) - float(dense(a).norm())) < 1e-5 * norm(a)
    with pytest.raises(TargetError, match="detach"), flora.nn.applied(model, merges(1)):
        nn.accumulate(model, merges(1))


def test_dense_weights_take_the_place_of_the_models():
    model, other = llama(dtype=torch.bfloat16), llama(seed=5, dtype=torch.bfloat16)
    flora.merge(model, merges(1), residual=True)
    sent = Broadcast(base=nn.weights(other, list(LAYERS)), version=7, run="r")
    assert bring_to(model, decode(encode(sent), expected=LAYERS)) and not bring_to(model, sent)
    assert version_of(model, "r") == 7 and not nn.residuals(model)
    assert all(torch.equal(model.get_submodule(n).weight, other.get_submodule(n).weight) for n in LAYERS)
    before, name = state(model), next(iter(LAYERS))
    for bad, error in (({"nowhere": torch.ones(2, 2)}, TargetError), ({name: torch.ones(3, 3)}, TargetError),
                       ({name: torch.full((16, 16), float("nan"))}, AdapterError)):
        with pytest.raises(error, match="expected .*got"):
            bring_to(model, Broadcast(base={**nn.weights(other, list(LAYERS)), **bad}, version=8, run="r"))
        assert same_state(model, before) and version_of(model, "r") == 7
    with pytest.raises(TargetError, match="floating point"):
        nn.load_weights(quantise(llama()), {name: torch.ones(16, 16)})


@pytest.mark.parametrize("settings", [
    {"into": "disk"}, {"rounding": "up"}, {"rank": 0}, {"tol": 1.0}, {"into": "adapter", "residual": True},
    {"into": "adapter", "rounding": "stochastic"}], ids=str)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match="expected .*got"):
        MergeConfig(**settings)


def two_dtypes():
    """One layer in bf16, which gets a residual, one in fp32: two calls of the operator."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 4, bias=False))
    model[0].to(torch.bfloat16)
    return model


def test_a_merge_of_several_calls_is_all_or_nothing():
    a, b = adapter(2, (5, 6)), adapter(2, (4, 5))
    for verb in (lambda m, bad: flora.merge(m, {"0": a, "1": bad}, residual=True),
                 lambda m, bad: nn.add_dense(m, {"0": dense(a).float(), "1": dense(bad).float()}, residual=True)):
        model = two_dtypes()
        before = state(model)
        b.B[1, 1] = float("nan")
        with pytest.raises(AdapterError, match="finite"):
            verb(model, b)
        assert same_state(model, before)
        b.B[1, 1] = 1.0
        verb(model, b)
        assert not any(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model = two_dtypes()
    model[1].weight = torch.nn.Parameter(torch.ones(1, 5).expand(4, 5), requires_grad=False)
    before = state(model)
    with pytest.raises(AdapterError, match="owns each of its elements"):
        flora.merge(model, {"0": a, "1": b}, residual=True)
    assert same_state(model, before)


def test_a_version_cannot_pass_over_merges_and_a_base_comes_without_a_merge():
    model = llama()
    bring_to(model, Broadcast(merge=merges(1), version=1, run="r"))
    with pytest.raises(RunError, match="merges between are missing"):
        bring_to(model, Broadcast(version=9, run="r"))
    before = state(model)
    with pytest.raises(RunError, match="in both"):
        bring_to(model, Broadcast(merge=merges(2), base=nn.weights(llama(seed=3), list(LAYERS)), version=2, run="r"))
    assert same_state(model, before) and version_of(model, "r") == 1 and not bring_to(model, Broadcast(version=2, run="r"))


def test_what_cannot_be_kept_beside_a_base_is_refused_and_small_updates_survive():
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(TargetError, match="past an adapter"):
        nn.accumulate(encoder, {"linear1": adapter(2, (16, 8))})
    with pytest.raises(TargetError, match="itself one linear"):
        nn.accumulate(torch.nn.Linear(3, 4), {"": adapter(2, (4, 3))})
    model, name = llama(), next(iter(LAYERS))
    half = adapter(2, LAYERS[name], 1, dtype=torch.float16)
    small = flora.Adapter(adapter(2, LAYERS[name], 2).A * 1e-9, adapter(2, LAYERS[name], 3).B, 1e9)
    nn.accumulate(model, {name: half})
    nn.accumulate(model, {name: small})
    assert relative(dense(nn.accumulated(model)[name]), dense(half) + dense(small)) < 1e-6


def test_checkpoints_hold_stacks_of_any_rank(tmp_path):
    from flora.checkpoint import RunFolder
    from flora.server import Server
    from flora.snapshot import Carried
    folder, wide = RunFolder(tmp_path / "run"), flora.Adapter(torch.ones((1 << 20) + 1, 1), torch.ones(1, (1 << 20) + 1), 1.0)
    folder.begin("{}", {})
    folder.save_checkpoint(llama(), 1, Server("flora", [], Broadcast(merge={"l": wide}, version=1)), Carried())
    assert folder.load_checkpoint().broadcast.merge["l"].rank == (1 << 20) + 1

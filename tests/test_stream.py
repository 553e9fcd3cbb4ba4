"""A round taken in as it comes: the exact average of ΔW, in memory that does not know how many clients there are."""
import math
import random

import pytest
import torch
from oracles import check, relative
from tiny import adapter, dense, llama, python

import flora
from flora import nn
from flora.adapter import Adapter, of_dense
from flora.errors import AdapterError, StrategyError
from flora.messages import Broadcast, Update, decode, encode
from flora.server import Server
from flora.stream import Stream
from flora.versions import MergeConfig, bring_to, version_of

LAYERS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.down_proj": (16, 24)}
COUNT = 40


def updates(count=COUNT, version=0, seed=0):
    """Of ranks 1 to 5; every third client lacks the second layer."""
    def layers(k):
        return list(LAYERS.items())[:2 if k % 3 else 1]

    return [Update({name: adapter(1 + k % 5, shape, seed + k) for name, shape in layers(k)}, 1 + k % 7, {}, version, f"c{k}")
            for k in range(count)]


def exact(given, absent="zero", weighting="examples"):
    out = {}
    for name, shape in LAYERS.items():
        n = [u.num_examples if weighting == "examples" else 1 for u in given]
        have = [(u, p) for u, p in zip(given, n, strict=True) if name in u.adapters]
        total = sum(n) if absent == "zero" else sum(p for _, p in have)
        out[name] = sum((p / total * dense(u.adapters[name]) for u, p in have), torch.zeros(shape).double())
    return out


def weight(model, name):
    return model.get_submodule(name).weight.detach()


@pytest.mark.parametrize("chunk", [1, 16, 10_000])
@pytest.mark.parametrize(("absent", "weighting"), [("zero", "examples"), ("renormalise", "examples"), ("zero", "uniform")])
def test_a_stream_is_the_exact_average(chunk, absent, weighting):
    model, given = llama(), updates()
    before = {name: weight(model, name).clone() for name in LAYERS}
    stream = Stream(model, LAYERS, run="r", absent=absent, weighting=weighting, max_ranks=chunk)
    for update in given:
        stream.add(update)
    sent = stream.close()
    for name, delta in exact(given, absent, weighting).items():
        check(weight(model, name), (before[name].double() + delta).float(), before[name].double() + delta)
    assert (sent.version, sent.run, sent.merge, version_of(model, "r")) == (1, "r", None, 1)
    other = llama()
    assert bring_to(other, decode(encode(sent)))
    assert all(torch.equal(weight(other, name), weight(model, name)) for name in LAYERS)


def test_the_order_of_replies_moves_the_last_bits_alone_and_a_fixed_order_none():
    def after(order):
        model = llama()
        stream = Stream(model, LAYERS, max_ranks=8)
        for update in order:
            stream.add(update)
        stream.close()
        return weight(model, next(iter(LAYERS)))

    given = updates()
    first, shuffled = after(given), random.Random(0).sample(given, COUNT)
    assert torch.equal(first, after(given)) and relative(after(shuffled), first.double()) < 1e-6


@pytest.mark.parametrize("failing", ["discard", "nothing", "nan", "version"])
def test_a_round_that_fails_leaves_the_base_and_the_next_round_alone(failing):
    model = llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stream, given = Stream(model, LAYERS, max_ranks=4), updates(6)
    if failing == "nothing":
        with pytest.raises(StrategyError, match="expected at least one update"):
            stream.close()
    for update in given if failing != "nothing" else ():
        stream.add(update)
    if failing == "nan":
        broken = {name: Adapter(a.A, a.B * float("nan"), a.scale) for name, a in given[1].adapters.items()}
        with pytest.raises(StrategyError, match="finite"):
            stream.add(Update(broken, 3, {}, 0, "broken"))
        with pytest.raises(StrategyError, match="expected one update a round"):
            stream.add(given[0])
        with pytest.raises(StrategyError, match="layers of this run"):
            stream.add(Update({"lm_head": adapter(2, (48, 16))}, 3, {}, 0, "other"))
        with pytest.raises(StrategyError, match="expected an adapter for"):
            stream.add(Update({next(iter(LAYERS)): adapter(2, (48, 16))}, 3, {}, 0, "other"))
    if failing == "version":
        with pytest.raises(StrategyError, match="version 0 of the base; got version 1"):
            stream.add(Update(given[0].adapters, 1, {}, 1, "late"))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    if failing in ("discard", "version"):
        stream.discard()
    if failing != "nan":
        for update in given:
            stream.add(update)
    stream.close()
    clean = llama()
    reference = Stream(clean, LAYERS, max_ranks=4)
    for update in given:
        reference.add(update)
    reference.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


def test_rounds_into_bf16_keep_their_residual_and_their_seed():
    name, how = next(iter(LAYERS)), MergeConfig(residual=True)
    model = llama(dtype=torch.bfloat16)
    total = weight(model, name).double()
    start = total.clone()
    stream = Stream(model, LAYERS, merge_config=how)
    for version in range(60):
        given = [Update({name: adapter(2, (16, 16), k) * 2e-4}, 1, {}, version, f"c{k}") for k in range(3)]
        for update in given:
            stream.add(update)
        stream.close()
        total = total + sum(dense(u.adapters[name]) for u in given) / 3
    left = nn.residuals(model)[name].double()
    assert float((weight(model, name).double() + left - total).norm()) < 0.02 * float((total - start).norm())

    def drawn(seed):
        model = llama(dtype=torch.bfloat16)
        stream = Stream(model, LAYERS, merge_config=MergeConfig(rounding="stochastic", seed=seed))
        stream.add(updates(1)[0])
        stream.close()
        return weight(model, name)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("how", [{"rank": 4}, {"tol": 0.4}, {"rank": 16}])
def test_a_compressed_downlink_is_what_the_server_merges_too(how):
    model, client, given = llama(), llama(), updates()
    stream = Stream(model, LAYERS, run="r", **how)
    for update in given:
        stream.add(update)
    sent = decode(encode(stream.close()))
    bring_to(client, sent)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), client.parameters(), strict=True)) and sent.base is None
    for name, delta in exact(given).items():
        error = relative(dense(sent.merge[name]), delta)
        assert abs(error - stream.errors[name]) < 1e-5
        kept = torch.linalg.svdvals(delta)[:sent.merge[name].rank].square().sum() / delta.square().sum()
        best = math.sqrt(1 - float(kept) + 1e-12)
        assert error < 1.05 * best + 1e-5 and ("tol" not in how or error <= 0.4) and sent.merge[name].rank <= how.get("rank", 16)


def test_the_best_adapter_of_a_dense_sum():
    a = adapter(5, (90, 70), 1)
    for options in ({"rank": 5}, {"tol": 1e-5}, {"rank": 3}, {}):
        got, error = of_dense(dense(a).float(), **options)
        assert abs(relative(dense(got), dense(a)) - error) < 1e-5
        assert (error < 1e-5) == (options != {"rank": 3}) and got.rank == options.get("rank", 70 if not options else 5)
    with pytest.raises(AdapterError, match="rank of at least 1"):
        of_dense(dense(a), rank=0)


def test_a_server_takes_replies_as_they_come():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    clients = [flora.LocalClient(f"c{k}", rows) for k in range(4)]
    model = llama()
    server = Server("flora", clients, Broadcast(run="r"), stream=Stream(model, LAYERS, run="r"))
    given = updates(4)
    server.receive(given[2])
    with pytest.raises(StrategyError, match="has sent one already"):
        server.receive(given[2])
    with pytest.raises(StrategyError, match="not among them"):
        server.receive(Update(given[0].adapters, 1, {}, 0, "stranger"))
    sent = server.close([given[0], given[3]])
    assert sent.version == 1 and sent is server.broadcast and sent.base is not None
    assert server.catch_up(0) is sent                                     # dense weights serve any client
    assert server.close() is sent                                         # a round without replies
    with pytest.raises(StrategyError, match="version 1 of the base"):
        server.close([Update(given[0].adapters, 1, {}, 1, "c0"), given[1]])
    assert server.close().version == 1 and not server.stream.clients
    with pytest.raises(StrategyError, match="expected strategy flora with a stream"):
        Server("fedit", clients, Broadcast(run="r"), stream=Stream(model, LAYERS, run="r"))


MEMORY = """
import resource, sys, torch
from flora.adapter import Adapter
from flora.messages import Update
from flora.stream import Stream
model = torch.nn.Sequential(torch.nn.Linear(1536, 576, bias=False))
stream = Stream(model, {"0": (576, 1536)})
def add(k):
    stream.add(Update({"0": Adapter(torch.randn(8, 1536), torch.randn(576, 8), 2.0)}, 1 + k % 5, {}, 0, f"c{k}"))
for k in range(200):
    add(k)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for k in range(200, int(sys.argv[1])):
    add(k)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
stream.close()
"""


def test_peak_memory_does_not_know_the_number_of_clients():
    """2,000 more clients of rank 8, 135 MB of factors, into a 576 x 1536 layer: a few MB for their names and the allocator."""
    done = python("-c", MEMORY, "2200")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12_000, f"{done.stdout} kB more"


def test_streams_leave_other_runs_alone_and_refuse_a_base_that_moved():
    model, name = llama(), next(iter(LAYERS))
    other = Broadcast(merge={name: adapter(2, LAYERS[name])}, version=1, run="other")
    bring_to(model, other)
    stream = Stream(model, LAYERS, run="r")
    stream.add(updates(1)[0])
    stream.close()
    assert not bring_to(model, other) and version_of(model, "other") == 1
    stream.add(updates(1, version=1)[0])
    bring_to(model, Broadcast(merge={name: adapter(2, LAYERS[name])}, version=2, run="r"))
    before = weight(model, name).clone()
    with pytest.raises(StrategyError, match="something else merged into it"):
        stream.close()
    assert torch.equal(weight(model, name), before) and not stream.clients


def test_a_close_that_fails_discards_the_round(monkeypatch):
    model, given = llama(), updates(3)
    stream = Stream(model, LAYERS)
    for update in given:
        stream.add(update)
    with monkeypatch.context() as patch:
        patch.setattr("flora.stream.add_dense", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.close()
    assert not stream.clients
    before = weight(model, next(iter(LAYERS))).double()
    for update in given:
        stream.add(update)
    stream.close()
    assert relative(weight(model, next(iter(LAYERS))), before + exact(given)[next(iter(LAYERS))]) < 1e-6


def test_a_client_that_missed_rounds_of_a_stream_gets_every_layer():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    model, late, names = llama(), llama(), list(LAYERS)
    server = Server("flora", [flora.LocalClient("c0", rows)], Broadcast(run="r"), stream=Stream(model, LAYERS, run="r"))
    for version, name in enumerate(names):
        server.close([Update({name: adapter(2, LAYERS[name])}, 1, {}, version, "c0")])
    bring_to(late, server.catch_up(0))
    assert all(torch.equal(weight(late, name), weight(model, name)) for name in names) and version_of(late, "r") == 2


def test_what_a_stream_cannot_do_is_refused():
    model = llama()
    with pytest.raises(StrategyError, match="writes into the base"):
        Stream(model, LAYERS, merge_config=MergeConfig(into="adapter"))
    with pytest.raises(StrategyError, match="shape of the model's weight"):
        Stream(model, dict.fromkeys(LAYERS, (16, 16)))
    stream, name = Stream(model, LAYERS), next(iter(LAYERS))
    huge = adapter(2, LAYERS[name])
    with pytest.raises(StrategyError, match="expected numbers up to 1e\\+12"):
        stream.add(Update({name: Adapter(huge.A, huge.B, 1e38)}, 100, {}, 0, "huge"))
    stream.add(updates(1)[0])
    stream.close()

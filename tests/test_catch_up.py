"""What a client that missed rounds is sent: the missed stacks in one, or the dense base; and updates that come one by one."""
import pytest
import torch
from oracles import relative
from test_versions import LAYERS, logits, merges
from tiny import adapter, llama, same, token_rows

import flora
from flora import nn
from flora.errors import RunError, StrategyError
from flora.messages import Broadcast, Update, decode, encode
from flora.server import Server
from flora.versions import bring_to, version_of


def server(rounds):
    """A server after so many rounds of two clients, and the model of a client that took every broadcast."""
    rows = token_rows(2)
    one = Server("flora", [flora.LocalClient(f"c{k}", rows) for k in range(2)], Broadcast(run="r"))
    faithful = llama(dtype=torch.float64)
    for number in range(rounds):
        one.close([Update(merges(10 * number + k, 1 + k, 0.1), k + 1, {}, number, f"c{k}") for k in range(2)])
        bring_to(faithful, one.broadcast)
    return one, faithful


@pytest.mark.parametrize("missed", [0, 1, 2, 3])
def test_a_client_that_missed_rounds_gets_all_of_them_in_one(missed):
    one, faithful = server(4)
    late = llama(dtype=torch.float64)
    behind, _ = server(4 - missed)
    behind = llama(dtype=torch.float64)
    again = server(0)[0]
    for number in range(4 - missed):
        again.close([Update(merges(10 * number + k, 1 + k, 0.1), k + 1, {}, number, f"c{k}") for k in range(2)])
        bring_to(behind, again.broadcast)
    if missed > 1:
        with pytest.raises(RunError, match=rf"Server.catch_up\({4 - missed}\)"):
            bring_to(behind, one.broadcast)
    sent = decode(encode(one.catch_up(4 - missed)))
    assert bring_to(behind, sent) == (missed > 0) and not bring_to(behind, sent) and version_of(behind, "r") == 4
    assert all(relative(a, b) < 1e-6 for a, b in zip(behind.parameters(), faithful.parameters(), strict=True))
    assert bring_to(late, one.catch_up(0)) and relative(logits(late), logits(faithful)) < 1e-6
    with pytest.raises(RunError, match="holds merges that this base has already"):
        bring_to(again_at(1), one.catch_up(0))


def again_at(version):
    model = llama()
    for number in range(1, version + 1):
        bring_to(model, Broadcast(merge=merges(number), version=number, run="r"))
    return model


def test_a_dense_base_is_sent_where_it_is_fewer_bytes_or_the_merges_are_gone():
    one, faithful = server(3)
    weights = nn.weights(faithful, list(LAYERS))
    stacked, small = one.catch_up(0), {n: w.to(torch.float16) for n, w in weights.items()}
    assert one.catch_up(0, weights).merge is not None                     # fp64 weights are more bytes than nine ranks in fp32
    sent = one.catch_up(0, small)
    assert sent.merge is None and sent.base is not None and len(encode(sent)) < len(encode(stacked))
    late = llama(dtype=torch.float64)
    assert bring_to(late, sent) and version_of(late, "r") == 3
    assert all(torch.equal(late.get_submodule(n).weight, w.double()) for n, w in small.items())
    fresh = Server("flora", one.clients, one.broadcast)                    # resumed: it holds the last merge alone
    assert fresh.catch_up(2).merge is not None and fresh.catch_up(0, weights).base is not None
    with pytest.raises(StrategyError, match=r"expected the merges of versions 1 to 3; this server holds \[3\]"):
        fresh.catch_up(0)
    with pytest.raises(StrategyError, match="never sent"):
        one.catch_up(9)


def test_history_does_not_grow_for_ever():
    one, _ = server(0)
    for number in range(40):
        one.close([Update(merges(number, 2), 1, {}, number, "c0")])
    held = sorted(one._merges)
    assert held[-1] == 40 and 8 < len(held) < 20 and held == list(range(held[0], 41))


def test_updates_may_come_one_by_one():
    updates = [Update(merges(k, 1 + k), k + 1, {}, 0, f"c{k}") for k in range(2)]
    at_once, one_by_one = server(0)[0], server(0)[0]
    one_by_one.receive(updates[1])
    one_by_one.receive(updates[0])
    with pytest.raises(StrategyError, match="has sent one already"):
        one_by_one.receive(updates[0])
    assert same(one_by_one.close().merge, at_once.close(updates).merge)
    one_by_one.receive(Update(merges(1), 1, {}, 1, "c0"))
    one_by_one.discard()
    assert one_by_one.close().version == 1


def test_what_went_as_weights_for_some_layers_is_never_made_up_of_merges():
    clients = [flora.LocalClient("a", [{"input_ids": [1], "labels": [1]}], 2)]
    whole = {"q": torch.ones(4, 4), "v": torch.ones(4, 4)}
    part = {"q": adapter(1, (4, 4))}
    for first, second in (({"merge": part, "base": {"v": torch.ones(4, 4)}}, {"merge": part}),
                          ({"base": {"q": torch.ones(4, 4)}}, {"base": {"v": torch.ones(4, 4)}})):
        server = Server("flora", clients, Broadcast(run="r"))
        server._send(Broadcast(version=1, run="r", **first))
        server._send(Broadcast(version=2, run="r", **second))
        assert server.catch_up(0, whole).base == whole and server.catch_up(1) is server.broadcast
        with pytest.raises(StrategyError, match="Give weights"):
            server.catch_up(0)

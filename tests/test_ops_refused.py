"""What an operator does not take raises AdapterError, which says what was expected and what came; nothing is written."""
import pytest
import torch

from flora import ops
from flora.errors import AdapterError, FloraError

W, X, A, B, S = torch.ones(7, 5), torch.ones(4, 5), torch.ones(3, 5), torch.ones(7, 3), torch.ones(3)
META = torch.device("meta")


def call(x=X, weight=W, a=A, b=B, scale=S, bias=None, **options):
    return ops.lora_linear(x, weight, a, b, scale, bias, **options)


LINEAR = {
    "x of another width": {"x": torch.ones(4, 6)}, "x without axes": {"x": torch.ones(())}, "x of integers": {"x": X.long()},
    "x complex": {"x": X.cfloat()}, "x of 8 bits": {"x": X.to(torch.float8_e4m3fn)}, "x elsewhere": {"x": X.to(META)},
    "weight of integers": {"weight": W.int()}, "weight of 8 bits": {"weight": W.to(torch.float8_e4m3fn)},
    "weight, a vector": {"weight": W[0]}, "weight transposed": {"weight": W.T}, "bias of another size": {"bias": torch.ones(5)},
    "bias, a matrix": {"bias": torch.ones(1, 7)}, "A of another width": {"a": torch.ones(3, 7)}, "A transposed": {"a": A.T},
    "A, a vector": {"a": A[0]}, "A of integers": {"a": A.long()}, "A elsewhere": {"a": A.to(META)},
    "B of another rank": {"b": torch.ones(7, 4)}, "B of another size": {"b": torch.ones(8, 3)}, "B transposed": {"b": B.T},
    "B of integers": {"b": B.int()}, "B elsewhere": {"b": B.to(META)}, "scale, a number": {"scale": torch.tensor(1.0)},
    "scale of one": {"scale": S[:1]}, "scale of integers": {"scale": S.int()}, "scale elsewhere": {"scale": S.to(META)},
    "dropout 1": {"dropout": 1.0}, "dropout under 0": {"dropout": -0.1}, "dropout NaN": {"dropout": float("nan")},
    "too few keys": {"dropout": 0.5, "seed": torch.zeros(3, dtype=torch.int64)},
    "keys of 32 bits": {"dropout": 0.5, "seed": torch.zeros(4, dtype=torch.int32)},
    "keys in a matrix": {"dropout": 0.5, "seed": torch.zeros(4, 1, dtype=torch.int64)},
    "a seed of half a number": {"dropout": 0.5, "seed": 1.5}, "a seed of float": {"dropout": 0.5, "seed": torch.tensor(1.5)},
    "a seed in words": {"dropout": 0.5, "seed": "seed"},
    "row offsets alone": {"row_offsets": [0, 4]}, "rank offsets alone": {"rank_offsets": [0, 3]},
    "offsets of other lengths": {"row_offsets": [0, 1, 4], "rank_offsets": [0, 3]},
    "row offsets too short": {"row_offsets": [0, 3], "rank_offsets": [0, 3]},
    "row offsets too long": {"row_offsets": [0, 5], "rank_offsets": [0, 3]},
    "rank offsets too short": {"row_offsets": [0, 4], "rank_offsets": [0, 2]},
    "rank offsets too long": {"row_offsets": [0, 4], "rank_offsets": [0, 4]},
    "offsets that fall": {"row_offsets": [0, 3, 2, 4], "rank_offsets": [0, 1, 2, 3]},
    "offsets that start at 1": {"row_offsets": [1, 4], "rank_offsets": [0, 3]},
    "offsets of a float": {"row_offsets": [0, 1.5, 4], "rank_offsets": [0, 1, 3]},
    "offsets in a float tensor": {"row_offsets": torch.tensor([0.0, 4.0]), "rank_offsets": [0, 3]},
    "offsets in a matrix": {"row_offsets": torch.tensor([[0, 4]]), "rank_offsets": [0, 3]},
    "offsets of words": {"row_offsets": ["0", "4"], "rank_offsets": [0, 3]},
    "no offsets": {"row_offsets": [], "rank_offsets": []}, "a number": {"row_offsets": 4, "rank_offsets": 3},
    "segments of other rows": {"row_offsets": ops.Segments([0, 3], [0, 3])},
    "segments of other ranks": {"row_offsets": ops.Segments([0, 4], [0, 2])},
    "segments and rank offsets": {"row_offsets": ops.Segments([0, 4], [0, 3]), "rank_offsets": [0, 3]},
    "offsets elsewhere": {"row_offsets": torch.zeros(2, dtype=torch.int64, device=META), "rank_offsets": [0, 3]},
    "frozen of another width": {"frozen": (torch.ones(2, 6), torch.ones(7, 2), torch.ones(2))},
    "frozen of two ranks": {"frozen": (torch.ones(2, 5), torch.ones(7, 3), torch.ones(2))},
    "frozen without scale": {"frozen": (torch.ones(2, 5), torch.ones(7, 2))}, "frozen, a number": {"frozen": 3},
    "frozen of integers": {"frozen": (torch.ones(2, 5).int(), torch.ones(7, 2), torch.ones(2))},
    "ranges for two clients": {"frozen": ops.Frozen(A, B, S, [(0, 1), (1, 2)])},
    "ranges for one of two": {"frozen": ops.Frozen(A, B, S, [(0, 1)]), "row_offsets": [0, 2, 4], "rank_offsets": [0, 1, 3]},
}


@pytest.mark.parametrize("name", LINEAR)
def test_lora_linear_refuses(name):
    with pytest.raises(AdapterError, match="expected .*got"):
        call(**LINEAR[name])


def test_the_same_call_without_a_fault_runs():
    frozen = ops.Frozen(A, B, S, [(0, 1), (1, 3)])
    y = call(bias=torch.ones(7), dropout=0.5, seed=1, row_offsets=[0, 2, 4], rank_offsets=[0, 1, 3], frozen=frozen)
    assert y.shape == (4, 7) and issubclass(AdapterError, (FloraError, ValueError))


@pytest.mark.parametrize("ranges", [[(0, 4)], [(-1, 2)], [(2, 1)], [(0, 1, 2)], [(0,)], torch.tensor([[0, 9]])], ids=str)
def test_ranges_outside_the_frozen_ranks_are_refused(ranges):
    with pytest.raises(AdapterError, match="frozen ranges: expected .*got"):
        ops.Frozen(A, B, S, ranges)


MERGE = {
    "weight, a vector": (W[0], A, B, S), "weight of integers": (W.int(), A, B, S), "weight transposed": (W.T, A, B, S),
    "weight of 8 bits": (W.to(torch.float8_e5m2), A, B, S), "weight expanded": (torch.ones(7, 1).expand(7, 5), A, B, S),
    "weight elsewhere": (W.to(META), A, B, S), "A transposed": (W, A.T, B, S), "A of integers": (W, A.int(), B, S),
    "B of another rank": (W, A, B[:, :2], S), "B of another size": (W, A, B[:6], S), "B elsewhere": (W, A, B.to(META), S),
    "A and B exchanged": (W, B, A, S), "scale of one": (W, A, B, S[:1]), "scale of integers": (W, A, B, S.int()),
    "scale, a number": (W, A, B, torch.tensor(1.0)), "A of 8 bits": (W, A.to(torch.float8_e5m2), B, S),
}


@pytest.mark.parametrize("name", MERGE)
def test_merge_refuses_and_writes_nothing(name):
    before = W.clone()
    with pytest.raises(AdapterError, match="expected .*got"):
        ops.merge_(*MERGE[name])
    assert torch.equal(W, before)


OUT = (torch.ones(5, 5), torch.ones(7, 5), torch.ones(5))
AS, BS, SS = [A, A[:2]], [B, B[:, :2]], [S, S[:2]]
STACK = {
    "a list too short": (*OUT, AS, BS, SS[:1]), "ranks that do not add up": (*OUT, AS[:1], BS[:1], SS[:1]),
    "an output too small": (OUT[0][:4], OUT[1][:, :4], OUT[2][:4], AS, BS, SS),
    "outputs of two ranks": (OUT[0], OUT[1][:, :4], OUT[2], AS, BS, SS),
    "no adapters": (*OUT, [], [], []), "an adapter of another layer": (*OUT, [A, torch.ones(2, 6)], BS, SS),
    "factors of two ranks": (*OUT, AS, [B, B[:, :1]], SS), "a scale too short": (*OUT, AS, BS, [S, S[:1]]),
    "an output, a vector": (OUT[0][0], OUT[1], OUT[2], AS, BS, SS),
    "an output of integers": (OUT[0].int(), OUT[1], OUT[2], AS, BS, SS),
    "factors of integers": (*OUT, [A, A[:2].int()], BS, SS),
    "out_scale in bf16": (OUT[0], OUT[1], OUT[2].bfloat16(), AS, BS, SS),
    "out_A expanded": (torch.ones(1, 5).expand(5, 5), OUT[1], OUT[2], AS, BS, SS),
    "an adapter elsewhere": (*OUT, [A, A[:2].to(META)], BS, SS),
    "out_scale expanded": (OUT[0], OUT[1], torch.ones(1).expand(5), AS, BS, SS),
}


@pytest.mark.parametrize("name", STACK)
def test_stack_refuses_and_writes_nothing(name):
    with pytest.raises(AdapterError, match="expected .*got"):
        ops.stack_(*STACK[name])
    assert all(torch.equal(t, torch.ones_like(t)) for t in OUT)

"""lora_linear under autograd: gradients of fp64, what is kept for the backward pass, dropout that repeats its mask."""
import pytest
import torch
from oracles import Case, relative
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flora import ops

COHORT = {"ranks": (2, 1, 3), "rows": (2, 0, 3)}
KINDS = {
    "one adapter": ((4, 3, 5, [2]), {"bias": True}), "cohort": ((5, 3, 4, COHORT["ranks"]), {"rows": COHORT["rows"]}),
    "dropout": ((4, 3, 5, [2]), {"dropout": 0.5}), "frozen": ((4, 3, 5, [2]), {"frozen": 3, "dropout": 0.3}),
    "all": ((5, 3, 4, COHORT["ranks"]), {"rows": COHORT["rows"], "frozen": 4, "ranges": [(0, 4), (1, 2), (2, 4)], "dropout": 0.4}),
}


def linear(case, **changes):
    return lambda x, A, B: ops.lora_linear(x, case.weight, A, B, case.scale, **{**case.keywords(), **changes})


def identity(x, dropout, seed):
    """dropout(x): W = 0, A = B = I, scale 1."""
    eye = torch.eye(x.shape[-1])
    return ops.lora_linear(x, eye * 0, eye, eye, torch.ones(len(eye)), dropout=dropout, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    """Finite differences in fp64: with dropout they agree only if backward repeats the mask of forward."""
    shape, options = KINDS[kind]
    case = Case(*shape, x=torch.float64, **options)
    assert torch.autograd.gradcheck(linear(case), [t.requires_grad_() for t in case.operands])


@pytest.mark.parametrize("kind", ["one adapter", "all"])
@pytest.mark.parametrize("wanted", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0), (1, 0, 1)], ids=str)
def test_only_the_gradients_asked_for(kind, wanted):
    """Each is the bits that it has among the others; x is kept for A alone, h for B alone."""
    shape, options = KINDS[kind]
    case, kept = Case(*shape, **options), []
    everything = [t.clone().requires_grad_() for t in case.operands]
    linear(case)(*everything).backward(case.dy)
    some = [t.clone().requires_grad_(bool(w)) for t, w in zip(case.operands, wanted, strict=True)]
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(case)(*some)
    y.backward(case.dy)
    for leaf, whole, w in zip(some, everything, wanted, strict=True):
        assert torch.equal(leaf.grad, whole.grad) if w else leaf.grad is None
    assert any(t.data_ptr() == some[0].data_ptr() and t.shape == some[0].shape for t in kept) == bool(wanted[1])
    given = [*some, case.weight, case.scale, *([case.keys] if case.dropout else [])]
    frozen = [case.frozen.A, case.frozen.B, case.frozen.scale] if case.frozen else []
    known = {t.untyped_storage().data_ptr() for t in given + frozen}
    fresh = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in known]
    assert sum(t.untyped_storage().nbytes() for t in fresh) == (4 * len(case.x) * max(shape[3]) if wanted[2] else 0)


def test_weight_bias_and_scale_get_no_gradient():
    case = Case(4, 3, 5, [2], bias=True)
    trained = [t.clone().requires_grad_() for t in (case.weight, case.bias, case.scale)]
    leaf = case.A.clone().requires_grad_()
    ops.lora_linear(case.x, trained[0], leaf, case.B, trained[2], trained[1]).sum().backward()
    assert leaf.grad is not None and all(t.grad is None for t in trained)
    assert not ops.lora_linear(case.x, trained[0], case.A, case.B, trained[2], trained[1]).requires_grad


def test_gradients_of_factors_come_in_their_dtype():
    case = Case(4, 3, 5, [2], x=torch.bfloat16, factor=torch.float32)
    leaves = [t.clone().requires_grad_() for t in case.operands]
    linear(case)(*leaves).backward(case.dy)
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]


def test_a_second_backward_is_refused():
    case = Case(4, 3, 5, [2])
    x, A, B = (t.clone().requires_grad_() for t in case.operands)
    [grad] = torch.autograd.grad(linear(case)(x, A, B).square().sum(), [A], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_write_into_the_weight_between_the_passes_is_seen():
    """merge_ and stack_ bump the version counter of what they write, so autograd refuses a backward pass over stale values."""
    case = Case(4, 3, 5, [2])
    x, A, B = (t.clone().requires_grad_() for t in case.operands)
    for write in (lambda: ops.merge_(case.weight, A, B, case.scale),
                  lambda: ops.stack_(A, B, case.scale, [case.A], [case.B], [case.scale.clone()])):
        y = linear(case)(x, A, B)
        with torch.no_grad():
            write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_same_seed_gives_the_same_mask_and_another_does_not():
    x = torch.ones(40, 30)
    one = identity(x, 0.5, 3)
    assert torch.equal(one, identity(x, 0.5, 3)) and torch.equal(one, identity(x, 0.5, torch.tensor(3)))
    assert torch.equal(one, identity(x, 0.5, ops.row_keys(3, torch.arange(40))))
    assert 0.3 < float((one != identity(x, 0.5, 4)).float().mean()) < 0.7
    assert torch.equal(one[:7], identity(x[:7], 0.5, 3))
    assert torch.equal(one.reshape(4, 10, 30), identity(x.reshape(4, 10, 30), 0.5, 3))
    assert torch.equal(identity(x, 0.0, 3), x)
    torch.manual_seed(5)
    drawn, more = identity(x, 0.5, None), identity(x, 0.5, None)
    torch.manual_seed(5)
    assert torch.equal(drawn, identity(x, 0.5, None)) and not torch.equal(drawn, more)


def test_a_mask_belongs_to_its_row_wherever_the_row_stands():
    """Packing, permuting and other rows beside it change nothing."""
    x, keys, order = torch.rand(40, 30) + 1, ops.row_keys(1, torch.arange(40)), torch.randperm(40)
    y = identity(x, 0.5, keys)
    assert torch.equal(identity(x[order], 0.5, keys[order]), y[order])
    assert torch.equal(identity(x[7:9], 0.5, keys[7:9]), y[7:9])


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_expectation(dropout):
    y = identity(torch.ones(300, 200), dropout, 0)
    deviation = (dropout * (1 - dropout) / y.numel()) ** 0.5
    assert abs(float((y == 0).double().mean()) - dropout) < 5 * deviation
    assert abs(float(y.double().mean()) - 1) < 5 * deviation / (1 - dropout)
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - dropout)))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(seed, reentrant):
    """The pass that is run again draws the same mask, also where the seed is drawn."""
    case = Case(6, 5, 4, [2, 3], rows=[2, 4], frozen=2, ranges=[(0, 1), (0, 2)], dropout=0.5)
    gradients = []
    for through in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)):
        leaves = [t.clone().requires_grad_() for t in case.operands]
        torch.manual_seed(1)
        y = through(lambda x, A, B: linear(case, seed=seed)(x, A, B).tanh(), *leaves)
        torch.manual_seed(2)
        y.backward(case.dy)
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_two_backward_passes_add_up():
    case = Case(6, 5, 4, [2])
    leaf = case.A.clone().requires_grad_()
    y = linear(case)(case.x, leaf, case.B)
    y.backward(case.dy, retain_graph=True)
    once = leaf.grad.clone()
    y.backward(case.dy)
    assert relative(leaf.grad, 2 * once) <= 1e-6

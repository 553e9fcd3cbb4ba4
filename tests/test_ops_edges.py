"""What is rare and must still be right: no columns, tensors with odd strides, memory shared, other devices, other derivatives."""
from types import SimpleNamespace

import pytest
import torch
from oracles import Case, check_case, output_and_gradients, relative
from test_backends import ONE_OF_EACH, backend
from torch.autograd import forward_ad

from flora import kernels, library, ops
from flora.errors import AdapterError
from flora.segments import keys_of


def linear(case, **changes):
    return lambda x, A, B: ops.lora_linear(x, case.weight, A, B, case.scale, **{**case.keywords(), **changes})


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize(("out", "inn"), [(0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_output_columns_and_no_input_columns(name, out, inn, rows):
    """Empty, or the bias alone; in every backend, forward and backward, for lora_add_ too."""
    for options in ({"frozen": 2}, {"rows": (rows - 2, 2), "dropout": 0.5}):
        case = Case(rows, out, inn, [2, 3] if "rows" in options else [2], bias=True, **options)
        with backend(name):
            y, dx, dA, dB = output_and_gradients(linear(case), case.operands, case.dy)
            added = ops.lora_add_(torch.ones(2, rows, out), torch.ones(2, rows, inn), case.A, case.B, case.scale)
        assert torch.equal(y, case.bias.expand(rows, out)) and torch.equal(added, torch.ones(2, rows, out))
        assert dx.shape == (rows, inn) and dA.shape == case.A.shape and dB.shape == case.B.shape
        assert not dx.any() and not dA.any() and not dB.any()


def test_an_entry_of_frozen_that_is_none_is_refused():
    x, W, A, B, s = torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2), torch.ones(2)
    for frozen in ([None, (A, B, s)], [(A, B, s), None], [(A, B, s)]):
        with pytest.raises(AdapterError, match="frozen: expected 2 entries, one a layer and none of them None"):
            ops.lora_linears(x, [W, W], [A, A], [B, B], [s, s], frozen=frozen)


@pytest.mark.parametrize("ranges", [[0, 2], torch.tensor([0, 2]), [(0.0, 1.9)], torch.tensor([[0.0, 1.9]]), 3, ["02"]], ids=str)
def test_ranges_that_are_no_pairs_of_ints_are_refused(ranges):
    with pytest.raises(AdapterError, match="frozen ranges: expected a pair of ints"):
        ops.Frozen(torch.ones(3, 5), torch.ones(7, 3), torch.ones(3), ranges)


def test_a_leaf_is_refused_before_it_is_written():
    case = Case(4, 5, 5, [2])
    leaf = torch.ones(4, 5, requires_grad=True)
    for y in (leaf, leaf[:], leaf.detach().requires_grad_().T.T):
        with pytest.raises(AdapterError, match="y: expected .*got a leaf that requires grad"):
            ops.lora_add_(y, case.x, case.A, case.B, case.scale)
        assert torch.equal(y, torch.ones(4, 5))
    with torch.no_grad():
        ops.lora_add_(leaf, case.x, case.A, case.B, case.scale)
    assert not torch.equal(leaf, torch.ones(4, 5))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_x_may_be_what_is_written(name):
    case = Case(6, 5, 5, [2], frozen=3)
    keywords = {key: value for key, value in case.keywords().items() if key != "bias"}

    def add(base, A, B):
        y = base * 1
        return ops.lora_add_(y, y, A, B, case.scale, **keywords)

    with backend(name):
        got = output_and_gradients(add, case.operands, case.dy)
    exact = output_and_gradients(lambda x, A, B: x + case.exact(x, A, B) - x @ case.weight.double().T,
                                 [t.double() for t in case.operands], case.dy.double())
    assert all(relative(a, e) < 1e-5 for a, e in zip(got, exact, strict=True))


def test_forward_mode_is_refused():
    case = Case(4, 3, 5, [2])
    with pytest.raises(AdapterError, match="differentiable once, in reverse mode"):
        torch.func.jvp(lambda x: linear(case)(x, case.A, case.B), (case.x,), (case.x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.A, case.A)
        with pytest.raises(AdapterError, match="differentiable once, in reverse mode"):
            linear(case)(case.x, dual, case.B)
        with pytest.raises(AdapterError, match="differentiable once, in reverse mode"):
            ops.lora_add_(torch.ones(4, 3), case.x, dual, case.B, case.scale)
        assert linear(case)(case.x, case.A, case.B).shape == (4, 3)


def test_meta_tensors_give_shapes():
    case = Case(4, 3, 5, [2], bias=True).to("meta")
    assert linear(case)(*case.operands).shape == (4, 3)


def test_a_seed_is_drawn_where_x_is():
    """A draw on the host would be copied to the device, which every layer would wait for."""
    before = torch.get_rng_state()
    assert keys_of(None, 5, torch.device("meta")).shape == (5,) and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    drawn = keys_of(None, 5, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(drawn, keys_of(None, 5, torch.device("cpu")))


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """On two GPUs as on one. The driver is stood in for: the body is what it is elsewhere."""
    entered, bodies, current = [], [], [0]

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)
            current.append(self.device.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(library, "LIB", SimpleNamespace(impl=lambda op, body, key: bodies.append(body)))
    monkeypatch.setattr(kernels, "resolve", lambda op, device, dtype: lambda ts: current[-1])
    library.implement("any")
    for index in (1, 0):
        assert bodies[0]([SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32)]) == index
    assert entered == [1] and current == [0]


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "triton addmm", "triton skinny", "triton fused"])
def test_vectors_of_any_strides(name):
    """Scales, biases and keys: expanded ones, and columns of a table."""
    for options in ({"rows": (6, 30), "ranges": [(0, 2), (1, 3)]}, {}):
        ranks = [3, 4] if options else [7]
        for spread in (lambda t: torch.stack((t, -t), dim=1)[:, 0], lambda t: t[:1].expand(len(t))):
            case = Case(36, 9, 11, ranks, bias=True, frozen=3, dropout=0.4, **options)
            case.scale, case.bias, case.keys = spread(case.scale), spread(case.bias), spread(case.keys)
            object.__setattr__(case.frozen, "scale", spread(case.frozen.scale))
            assert case.scale.stride() != (1,)
            with backend(name):
                check_case(case, linear(case))

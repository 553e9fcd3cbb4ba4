"""Every operator passes opcheck and is one node of torch.compile: no graph break, no second compilation."""
import pytest
import torch
from oracles import Case, adapter, check_case, output_and_gradients
from torch._dynamo.testing import CompileCounterWithBackend

import flora
from flora import ops

COHORT = {"rows": (5, 0, 11), "frozen": 4, "ranges": [(0, 4), (1, 2), (0, 0)]}
KINDS = {
    "plain": ((7, 5, 6, [3]), {}), "bias": ((7, 5, 6, [3]), {"bias": True}), "dropout": ((7, 5, 6, [3]), {"dropout": 0.5}),
    "segments": ((16, 5, 6, [2, 1, 3]), {"rows": COHORT["rows"]}), "all": ((16, 5, 6, [2, 1, 3]), {**COHORT, "dropout": 0.5}),
    "bf16": ((7, 5, 6, [3]), {"x": torch.bfloat16, "factor": torch.float32, "frozen": 2}),
}


def make(kind):
    shape, options = KINDS[kind]
    return Case(*shape, **options)


def operator_arguments(case):
    """What the operator gets below autograd."""
    as_tensor = lambda values: None if values is None else torch.tensor(values)              # noqa: E731
    frozen = [] if case.frozen is None else [case.frozen.A, case.frozen.B, case.frozen.scale]
    segments = [as_tensor(case.row_offsets), as_tensor(case.rank_offsets), as_tensor(case.ranges)]
    width = max(r.stop - r.start for _, _, r in case.segments())
    keys = [case.keys] if case.dropout else []
    shared = ([case.A], [case.B], [case.scale], frozen, *segments, [width], case.dropout, keys)
    h = torch.randn(len(case.x), width).to(case.dtype)
    return (case.x, [case.weight], [case.bias], *shared), lambda x, needs: ([case.dy], x, h, [case.weight], *shared, needs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turned", [False, True])
def test_opcheck_of_lora_linear(kind, turned):
    case = make(kind)
    case.B = case.B.T.contiguous().T if turned else case.B
    forward, backward = operator_arguments(case)
    torch.library.opcheck(torch.ops.flora.lora_linear.default, forward)
    for needs in ([True, True, True], [True, False, False], [False, False, True]):
        torch.library.opcheck(torch.ops.flora.lora_linear_backward.default, backward(case.x if needs[1] else None, needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_operators_in_place(dtype):
    a, b = adapter(7, 5, 3, dtype=dtype), adapter(7, 5, 2, dtype=dtype)
    for weight in (torch.randn(7, 5).to(dtype), torch.randn(5, 7).to(dtype).T):
        for residuals, seeds in (([], []), ([torch.zeros(7, 5).to(dtype)] * 1, [3]), ([], [5])):
            torch.library.opcheck(torch.ops.flora.merge_.default,
                                  ([weight.clone()], residuals, [a.A, b.A], [a.B, b.B], [a.scale, b.scale], [2], seeds))
    out = (torch.empty(5, 5).to(dtype), torch.empty(7, 5).to(dtype), torch.empty(5))
    torch.library.opcheck(torch.ops.flora.stack_.default, (*out, [a.A, b.A], [a.B, b.B], [a.scale, b.scale]))


def test_the_schemas_say_what_is_written():
    schemas = {name: getattr(torch.ops.flora, name).default._schema for name in ("lora_linear", "merge_", "stack_")}
    written = {name: [a.name for a in s.arguments if a.alias_info and a.alias_info.is_write] for name, s in schemas.items()}
    assert written == {"lora_linear": [], "merge_": ["weights", "residuals"], "stack_": ["out_A", "out_B", "out_scale"]}


@pytest.mark.parametrize(("kind", "backend"), [*((kind, "aot_eager") for kind in KINDS), ("all", "inductor"), ("bf16", "inductor")])
def test_compiled_whole_it_gives_the_same_and_compiles_once(kind, backend):
    torch._dynamo.reset()
    case = make(kind)
    keywords = case.keywords()
    if case.row_offsets is not None:
        keywords |= {"row_offsets": ops.Segments(case.row_offsets, case.rank_offsets), "rank_offsets": None}
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x, A, B):
        return ops.lora_linear(x * 1, case.weight, A, B, case.scale, **keywords)

    check_case(case, compiled)
    eager = output_and_gradients(lambda x, A, B: ops.lora_linear(x * 1, case.weight, A, B, case.scale, **keywords), case.operands,
                                 case.dy)
    again = output_and_gradients(compiled, case.operands, case.dy)
    assert all(torch.equal(a, b) for a, b in zip(again, eager, strict=True))
    case.x = torch.randn_like(case.x)
    check_case(case, compiled)
    assert counter.frame_count == 1


def test_a_seed_in_a_tensor_does_not_compile_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    case = make("plain")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x, seed):
        return ops.lora_linear(x, case.weight, case.A, case.B, case.scale, dropout=0.5, seed=seed)

    for number in (3, 4):
        seed = torch.tensor(number)
        expected = ops.lora_linear(case.x, case.weight, case.A, case.B, case.scale, dropout=0.5, seed=seed)
        assert torch.equal(compiled(case.x, seed), expected)
    assert counter.frame_count == 1


def test_merge_and_stack_compile():
    torch._dynamo.reset()
    a, b = adapter(7, 5, 3), adapter(7, 5, 2)
    weight, expected = torch.randn(7, 5), None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(weight, out_A, out_B, out_scale):
        ops.stack_(out_A, out_B, out_scale, [a.A, b.A], [a.B, b.B], [a.scale, b.scale])
        return ops.merge_(weight, out_A, out_B, out_scale) * 2

    both = flora.stack([a, b])
    expected = ops.merge_(weight.clone(), both.A, both.B, both.scale)
    out = torch.empty(5, 5), torch.empty(7, 5), torch.empty(5)
    doubled = compiled(weight, *out)
    assert torch.equal(weight, expected) and torch.equal(doubled, 2 * expected)
    assert torch.equal(out[0], both.A) and torch.equal(out[1], both.B) and torch.equal(out[2], both.scale)


def test_an_attached_model_compiles_whole():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    flora.attach(model, rank=2, dropout=0.5)
    for layer in (model[0], model[2]):
        torch.nn.init.normal_(layer.B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    compiled(x).sum().backward()
    assert model[0].A.grad.any() and model[2].B.grad.any()
    model.eval()
    assert torch.equal(compiled(x), model(x))


def test_cohorts_to_come_do_not_compile_again():
    """Sizes become dynamic after the first cohorts differ; from then on rows, ranks and the number of clients may change."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x, weight, A, B, scale, segments):
        return ops.lora_linear(x, weight, A, B, scale, row_offsets=segments)

    counts = []
    for rows, ranks in (((3, 4), (2, 3)), ((2, 5), (4, 1)), ((3, 4, 5), (2, 2, 2)), ((9, 0, 2), (2, 5, 2)),
                        ((3, 4, 2, 7), (2, 5, 2, 3)), ((30, 4, 2, 7, 1), (2, 5, 2, 3, 8))):
        case = Case(sum(rows), 5, 6, ranks, rows=rows)
        segments = ops.Segments(case.row_offsets, case.rank_offsets)
        check_case(case, lambda x, A, B, case=case, seg=segments: compiled(x, case.weight, A, B, case.scale, seg))
        counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 4

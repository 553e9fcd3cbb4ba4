"""Every operator on small odd shapes against fp64, a line a call, few enough for compute-sanitizer (command: docs/kernels.md).
Without a card the backends of this processor. Leaves with 1 where an answer is wrong."""
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from flora import kernels, ops
from flora.kernels.triton import rule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracles import FLOATS, Case, adapter, check, check_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"one adapter": ((33, 29, 35, [8]), {"bias": True}), "dropout": ((33, 29, 35, [3]), {"dropout": 0.3}),
         "clients": ((40, 29, 35, [1, 8, 40]), {"rows": (21, 0, 19), "frozen": 5, "dropout": 0.2})}


def merge(dtype: torch.dtype, kept: bool, by_chance: bool) -> None:
    """Edges, strides and whole tiles, in one call."""
    weights = [torch.randn(shape).to(DEVICE, dtype) for shape in ((66, 70), (140, 99), (64, 256))]
    weights[1] = weights[1][::2, 1::3]
    clients = [[adapter(*w.shape, rank, dtype=d).to(DEVICE) for rank, d in ((8, dtype), (3, torch.float32))] for w in weights]
    exact = [w.double() + sum(a.delta() for a in layer) for w, layer in zip(weights, clients, strict=True)]
    cast = [[a.to(dtype) for a in layer] for layer in clients]
    plain = [w + sum((a.B * a.scale.to(dtype)) @ a.A for a in layer) for w, layer in zip(weights, cast, strict=True)]
    left = [torch.zeros(w.shape, device=DEVICE).to(dtype) for w in weights] if kept else None
    lists = ([[getattr(a, name) for a in layer] for layer in clients] for name in ("A", "B", "scale"))
    ops.merge_many_(weights, *lists, residuals=left, rounding="stochastic" if by_chance else "nearest", seed=1)
    for got, p, e in zip(weights, plain, exact, strict=True):
        if by_chance and not kept:                                # up or down: within one last place, not half of one
            assert bool(((got.double() - e).abs() <= 1.01 * torch.finfo(dtype).eps * e.abs() + 1e-6).all()), "too far"
        else:
            check(got, p, e)


def stack(dtype: torch.dtype) -> None:
    many = [adapter(31, 29, rank).to(DEVICE) for rank in (3, 16, 1)]
    A, B = (torch.empty(shape, device=DEVICE, dtype=dtype) for shape in ((20, 29), (31, 20)))
    ops.stack_(A, B, torch.empty(20, device=DEVICE), *([getattr(a, name) for a in many] for name in ("A", "B", "scale")))
    assert torch.equal(A, torch.cat([a.A for a in many]).to(dtype)) and torch.equal(B, torch.cat([a.B for a in many], 1).to(dtype))


def linear(form: rule.Form | None, kind: str, dtype: torch.dtype, added: bool) -> None:
    """Forward and backward; added: the LoRA path alone, on top of a base product."""
    shape, given = KINDS[kind]
    case = Case(*shape, **given, x=dtype).to(DEVICE)
    options = case.keywords()
    bias = options.pop("bias")

    def call(x, A, B):
        if not added:
            return ops.lora_linear(x, case.weight, A, B, case.scale, bias, **options)
        return ops.lora_add_(torch.nn.functional.linear(x, case.weight, bias), x, A, B, case.scale, **options)
    with rule.use(form) if form else nullcontext():
        check_case(case, call)


def calls() -> Iterator[tuple[Callable[..., None], tuple]]:
    yield from ((merge, given) for given in itertools.product(FLOATS, (False, True), (False, True)))
    yield from ((stack, (dtype,)) for dtype in FLOATS)
    for form in rule.FORMS if DEVICE == "cuda" else (None,):
        yield from ((linear, given) for given in itertools.product([form], KINDS, FLOATS[:3], (False, True)))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(*(f"{c.operator} on {c.device}: {c.backend}" for c in kernels.table()), sep="\n")
    wrong = False
    for function, given in calls():
        said = "right"
        try:
            function(*given)
        except AssertionError as error:
            said, wrong = f"WRONG: {error}", True
        print(f"{function.__name__} {', '.join(map(str, given))}: {said}", flush=True)
    sys.exit(wrong)

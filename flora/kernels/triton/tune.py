"""Measures the forms of rule.py on this card and writes the table that rule.form reads.

Per shape, pass and form: interleaved calls, medians. A form other than the `addmm_` one is taken where it is at least 3 %
faster, so that noise does not choose; clients have no `addmm_` form, so there the cuBLAS base product is the one to beat.
"""
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from flora.kernels import triton as backend
from flora.kernels.triton import rule

MARGIN = 0.97
CLIENTS = 10


class Shape(NamedTuple):
    """A call to measure: rows, out_features, in_features, the ranks that a row sees, whether ten clients share the rows."""
    M: int
    N: int
    K: int
    ranks: int
    segmented: bool


class Measured(NamedTuple):
    """What one pass of one shape gave: its key, the form taken, and the median seconds of every form."""
    key: str
    form: rule.Form
    seconds: dict[rule.Form, float]


def _passes(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """The forward and the backward operator on random operands."""
    M, N, K, R, segmented = shape
    new = {"dtype": dtype, "device": device}
    x, dy, W = torch.randn(M, K, **new), torch.randn(M, N, **new), torch.randn(N, K, **new)
    count = CLIENTS if segmented else 1
    A, B, scale = torch.randn(count * R, K, **new), torch.randn(N, count * R, **new), torch.ones(count * R, device=device)
    offsets = [torch.tensor([n * k // count for k in range(count + 1)]) for n in (M, count * R)] if segmented else [None, None]
    shared = ([A], [B], [scale], [], *offsets, None, [R], 0.0, [])
    h = torch.randn(M, R, **new)
    return {"forward": lambda: backend.lora_linear(x, [W], [None], *shared),
            "backward": lambda: backend.lora_linear_backward([dy], x, h, [W], *shared, [True] * 3)}


def measure(shape: Shape, dtype: torch.dtype, device: str, repeats: int = 20, warmup: int = 5) -> Iterator[Measured]:
    """The best form of each pass of a shape."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    forms = [form for form in rule.FORMS if form.skinny == "triton" or not shape.segmented]
    for op, call in _passes(shape, dtype, device).items():
        seconds: dict[rule.Form, list[float]] = {form: [] for form in forms}
        for number in range(warmup + repeats):
            for form in forms:
                with rule.use(form):
                    wait()
                    began = time.perf_counter()
                    call()
                    wait()
                if number >= warmup:
                    seconds[form].append(time.perf_counter() - began)
        medians = {form: statistics.median(values) for form, values in seconds.items()}
        floor, best = forms[0], min(medians, key=medians.get)
        taken = best if medians[best] < MARGIN * medians[floor] else floor
        yield Measured(rule.shape_key(op, *shape, dtype), taken, medians)


def tune(shapes: Iterable[Shape], dtype: torch.dtype, device: str = "cuda") -> Iterator[Measured]:
    """Measures every shape and adds each result, at once, to this card's table in rule.own_tables()."""
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    path = rule.own_tables() / f"{rule.device_key(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    forms = json.loads(path.read_text())["forms"] if path.exists() else {}
    about = {"device": name, "torch": torch.__version__, "triton": backend.triton.__version__}
    for shape in shapes:
        for result in measure(shape, dtype, device):
            forms[result.key] = list(result.form)
            yield result
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"about": about, "forms": forms}, indent=1) + "\n")
        partial.replace(path)
    rule.table.cache_clear()
    rule._form.cache_clear()

"""`flora bench`: the operators on this machine against plain PyTorch and against what the machine could do at most.

Plain PyTorch is the formula as one would write it. A result is compared with fp64 before it is timed: on a wrong one nothing is
reported. The benchmarks of whole rounds and of PEFT are in a source tree (make bench); `stored` reads the tables that they left.
"""
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear

from flora import ops
from flora.adapter import Adapter
from flora.allocator import keep_large_blocks
from flora.errors import BackendError, ConfigError
from flora.options import nearest
from flora.speed import copy_bandwidth, device_name, interleaved, matmul_peak, roofline, rows_of
from flora.speed import show as show_case

NAMES = ("lora_linear", "merge")
SHAPES = ((1536, 576), (2048, 2048), (4096, 4096))              # (out, in): of SmolLM2-135M, a 1B and a 7B Llama
ROWS, RANK = 512, 16
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)                      # of ten clients: FLoRA, arXiv 2409.05976, section 4
WIDTH = 110                                                     # of a table whose numbers are not cut
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def bench(name: str | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """Rows {"case", "variant", "ms", "ms_low", "ms_high", "against", "times_against", "times_limit"}: medians and quartiles of
    calls that take turns. name: "lora_linear" or "merge" (None: both); quick: the smallest shape, five calls.

    times_limit: of the roofline, the larger of operations over this machine's measured peak and bytes over its copy bandwidth.
    Raises ConfigError for another name, BackendError where a result is not that of fp64.
    """
    if name is not None and name not in NAMES:
        raise ConfigError(f"expected lora_linear or merge; got {name!r}{nearest(name, NAMES)} flora bench --show has tables of "
                          "others.")
    keep_large_blocks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    limits = matmul_peak(dtype, device), copy_bandwidth(device)
    found = []
    for shape in SHAPES[:1] if quick else SHAPES:
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=draw).to(device, dtype)
        for which, cases in (("lora_linear", _linears), ("merge", _merges)):
            for title, calls, limit in cases(weight, draw, limits) if name in (None, which) else ():
                seconds = interleaved(calls, 5 if quick else 15)
                found += rows_of(f"{which}, {shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}, {title}", seconds,
                                 "plain PyTorch", limit)
    return found


Case = tuple[str, dict[str, Callable[[], object]], float]


def _adapter(shape: Sequence[int], rank: int, draw: torch.Generator, like: Tensor) -> Adapter:
    A, B = torch.randn(rank, shape[1], generator=draw) * 0.02, torch.randn(shape[0], rank, generator=draw) * 0.02
    return Adapter(A.to(like), B.to(like), 2.0)


def _linears(weight: Tensor, draw: torch.Generator, limits: tuple[float, float]) -> Iterator[Case]:
    a = _adapter(weight.shape, RANK, draw, weight)
    x = torch.randn(ROWS, weight.shape[1], generator=draw).to(weight)
    scale = a.scale.to(weight)

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, A, B, a.scale)

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(x, weight) + (x @ A.T * scale) @ B.T

    wide = [t.double() for t in (x, weight, a.A, a.B, a.scale)]
    _check(ours(x, a.A, a.B), plain(x, a.A, a.B), wide[0] @ wide[1].T + (wide[0] @ wide[2].T * wide[4]) @ wide[3].T)
    grad, inputs = torch.ones(ROWS, len(weight)).to(weight), [t.clone().requires_grad_() for t in (x, a.A, a.B)]
    variants: Mapping[str, Callable[..., Tensor]] = {"flora": ours, "plain PyTorch": plain}
    forward = {name: lambda f=f: f(x, a.A, a.B) for name, f in variants.items()}
    both = {name: lambda f=f: torch.autograd.grad(f(*inputs), inputs, grad) for name, f in variants.items()}
    both["bare product"] = lambda: torch.autograd.grad(linear(inputs[0], weight), inputs[0], grad)
    for what, calls, backward in (("forward", {**forward, "bare product": lambda: linear(x, weight)}, False),
                                  ("forward + backward", both, True)):
        limit = roofline([("", *weight.shape)], ROWS, RANK, weight.itemsize, limits, backward)
        yield f"{ROWS} rows, rank {RANK}, {what}", calls, limit


def _merges(weight: Tensor, draw: torch.Generator, limits: tuple[float, float]) -> Iterator[Case]:
    clients = [_adapter(weight.shape, rank, draw, weight) * 0.1 for rank in RANKS]
    factors = [[[getattr(a, name) for a in clients]] for name in ("A", "B", "scale")]

    def ours(weight: Tensor) -> None:
        ops.merge_many_([weight], *factors)

    def plain(weight: Tensor) -> None:
        weight.addmm_(torch.cat([a.B * a.scale.to(a.B) for a in clients], 1), torch.cat([a.A for a in clients]))

    def one_by_one(weight: Tensor) -> None:
        for a in clients:
            weight.addmm_(a.B * a.scale.to(a.B), a.A)

    made, usual = weight.clone(), weight.clone()
    ours(made)
    plain(usual)
    _check(made, usual, weight.double() + sum(a.delta().to(weight.device) for a in clients))
    calls = {"flora": ours, "plain PyTorch": plain, "one client after another": one_by_one}
    copies = {name: weight.clone() for name in calls}
    yield (f"{len(clients)} clients, R = {sum(RANKS)}", {name: lambda f=f, own=copies[name]: f(own) for name, f in calls.items()},
           2 * weight.nbytes / limits[1])


def _check(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """error <= 2 error(plain PyTorch) + (1e-7 + 2 eps / √numel) ‖exact‖, against fp64."""
    error, usual = (float((got.double() - exact).norm()) for got in (ours, plain))
    allowed = 2 * usual + (1e-7 + 2 * torch.finfo(ours.dtype).eps / exact.numel() ** 0.5) * float(exact.norm())
    if not error <= allowed:
        raise BackendError(f"expected an error of at most {allowed:.2e} against fp64; got {error:.2e}, so no time is reported. "
                           "Run the tests of flora (make test), or measure another backend, under flora.kernels.use.")


def stored(name: str | None = None) -> list[dict[str, Any]]:
    """The rows that benchmarks left in a source tree, with their "device" and the "name" of the file. name: of one file, such as
    "cohort" (None: all). Raises ConfigError where there is no source tree, or no such name."""
    files = sorted(path for path in RESULTS.glob("*/**/*.json") if "rows" in json.loads(path.read_text()))
    if not files:
        raise ConfigError(f"expected the results of benchmarks in {RESULTS}; got none: this flora was installed without its "
                          "source. Run it from a clone, or measure here: flora bench.")
    names = sorted({path.stem for path in files})
    if name is not None and name not in names:
        raise ConfigError(f"expected one of {', '.join(names)}; got {name!r}{nearest(name, names)}")
    return [{"device": path.parent.relative_to(RESULTS).as_posix(), "name": path.stem, **row}
            for path in files if name in (None, path.stem)
            for row in json.loads(path.read_text())["rows"] if row.get("ms") is not None]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table a case, under the device that it was measured on."""
    console = Console(highlight=False, width=max(Console().width, WIDTH))
    for device, name in dict.fromkeys((row.get("device", device_name()), row.get("name", "bench")) for row in rows):
        console.print(f"{name} on {device}; ms: median (quartiles); x peer: times that of the variant marked *; x limit: times the "
                      "limit", soft_wrap=True)
        mine = [row for row in rows if (row.get("device", device_name()), row.get("name", "bench")) == (device, name)]
        for case in dict.fromkeys(row["case"] for row in mine):
            show_case(console, case, [row for row in mine if row["case"] == case])

"""Ten clients (ranks 64 to 4) into all weights of a model: flora's one call, PEFT, and addmm_ as one would write it by hand.

    python -m benchmarks.bench_merge [--models SmolLM2-135M 2048x5632 7B ...] [--dtypes float32 bfloat16] [--layers N]

The limit is the copy bandwidth of this machine over the bytes of the weights, read and written once. Extra memory is the peak of
a call over what was held before it. The same merges keep being added to the same weights; no variant's time depends on them.
Then two tables on what merges leave: the error of 200 of them into bf16, and the memory of 10,000 clients that arrive in a stream.
"""
import argparse
import itertools
import warnings
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.gate import require_green
from benchmarks.measure import memory, publish, reset_peak
from benchmarks.shapes import MODELS, RANKS
from flora import kernels, ops
from flora.adapter import Adapter, stack
from flora.messages import Update
from flora.speed import copy_bandwidth, interleaved, on_the_card, rows_of
from flora.stream import Stream

ALONE = "flora, the operator alone"
WAITS = ("flora", "flora, bf16 adapters", "flora, stochastic", "flora, residual")       # for the card's answer that all is finite
BLOCKS = {"SmolLM2-135M": 30, "1B": 16, "3B": 28, "7B": 32, "70B": 80}


class Case:
    """The weights of a model and ten clients' adapters for each."""

    def __init__(self, shapes: list[tuple[int, int]], weight: torch.dtype, factor: torch.dtype, device: str):
        torch.manual_seed(0)
        new = {"device": device}
        self.weights = [torch.randn(shape, **new).to(weight) for shape in shapes]
        def one(rank: int, out: int, inn: int) -> Adapter:
            A, B = torch.randn(rank, inn, **new) * 0.02, torch.randn(out, rank, **new) * 0.02
            return Adapter(A.to(factor), B.to(factor), 0.2)

        self.clients = [[one(rank, *shape) for rank in RANKS] for shape in shapes]
        self.stacks = [stack(layer) for layer in self.clients]
        self.lists = [[[getattr(a, name) for a in layer] for layer in self.clients] for name in ("A", "B", "scale")]

    def flora(self, **options) -> Callable[[], object]:
        return lambda: ops.merge_many_(self.weights, *self.lists, **options)

    def alone(self) -> Callable[[], object]:
        """The operator without the checks, its lists made beforehand."""
        flat = [[t for layer in lists for t in layer] for lists in self.lists]
        operator = kernels.resolve("merge_", self.weights[0].device, self.weights[0].dtype)
        return lambda: operator(self.weights, [], *flat, [len(layer) for layer in self.lists[0]], [])

    def addmm_stack(self, dtype: torch.dtype) -> Callable[[], object]:
        """One addmm_ a weight, of stacks concatenated, scaled and cast before; a weight of another dtype goes through a copy."""
        pairs = [((a.B.float() * a.scale).to(dtype), a.A.to(dtype)) for a in self.stacks]

        def call() -> None:
            for weight, (B, A) in zip(self.weights, pairs, strict=True):
                if weight.dtype == dtype:
                    weight.addmm_(B, A)
                else:
                    weight.copy_(torch.addmm(weight.to(dtype), B, A))
        return call

    def cat_and_addmm(self) -> None:
        for weight, layer in zip(self.weights, self.clients, strict=True):
            A = torch.cat([a.A for a in layer]).to(weight.dtype)
            weight.addmm_(torch.cat([a.B * a.scale for a in layer], 1).to(weight.dtype), A)

    def addmm_each(self) -> None:
        for weight, layer in zip(self.weights, self.clients, strict=True):
            for a in layer:
                weight.addmm_((a.B * a.scale).to(weight.dtype), a.A.to(weight.dtype))


def peft_model(case: Case) -> nn.Module | None:
    """The same weights and clients in PEFT; None where it is not installed."""
    try:
        import peft
    except ImportError:
        return None
    base = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in case.weights))
    base = base.to_empty(device=case.weights[0].device).to(case.weights[0].dtype)
    for linear, weight in zip(base, case.weights, strict=True):
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    targets = [str(i) for i in range(len(base))]
    model = None
    for k, rank in enumerate(RANKS):
        config = peft.LoraConfig(r=rank, lora_alpha=0.2 * rank, target_modules=targets)
        if model is None:
            model = peft.get_peft_model(base, config, f"c{k}")
        else:
            model.add_adapter(f"c{k}", config)
        for i, layer in enumerate(case.clients):
            module = model.base_model.model[i]
            module.lora_A[f"c{k}"].weight.data = layer[k].A.clone()
            module.lora_B[f"c{k}"].weight.data = layer[k].B.clone()
    return model


def peft_calls(case: Case) -> dict[str, Callable[[], object]]:
    """PEFT's own ways: every adapter merged in turn; or concatenated (add_weighted_adapter) and merged."""
    model = peft_model(case)
    if model is None:
        return {}
    names = [f"c{k}" for k in range(len(RANKS))]
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]

    def merge(adapters: list[str]) -> None:
        model.merge_adapter(adapters)
        for layer in layers:
            layer.merged_adapters.clear()

    def cat() -> None:
        model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type="cat")
        merge(["all"])
        model.delete_adapter("all")

    return {"PEFT one by one": lambda: merge(names), "PEFT cat + merge": cat}


def extra_megabytes(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call over what was held before, in MB; None where the system does not say."""
    if not reset_peak(device) or (held := memory(device)) is None:
        return None
    call()
    return max(0.0, memory(device, peak=True) - held) / 1e6


def shapes_of(model: str, blocks: int | None) -> list[tuple[int, int]]:
    """(out, in) of all linears of a model, or of one weight, "2048x5632"."""
    if model in MODELS:
        return [(out, inn) for _, out, inn in MODELS[model]] * (blocks or BLOCKS[model])
    out, inn = model.split("x")
    return [(int(out), int(inn))]


def title(model: str, weights: int, dtype: str) -> str:
    """The name of a case in the tables."""
    return f"{model}: {weights} weights, {dtype}, {len(RANKS)} clients, R = {sum(RANKS)}"


def measure(model: str, name: str, device: str, layers: int | None, repeats: int) -> list[dict]:
    """The rows of one model's weights in one dtype."""
    shapes, dtype = shapes_of(model, layers), getattr(torch, name)
    case, half = (Case(shapes, dtype, factor, device) for factor in (torch.float32, torch.bfloat16))
    calls = {"flora": case.flora(), "flora, bf16 adapters": half.flora(),
             ALONE: case.alone(), "addmm_ of an fp32 stack": case.addmm_stack(torch.float32)}
    if dtype != torch.float32:
        left = [torch.zeros_like(w, dtype=torch.bfloat16) for w in case.weights]
        calls |= {"flora, stochastic": case.flora(rounding="stochastic", seed=1),
                  "flora, residual": case.flora(residuals=left), f"addmm_ of a {name} stack": case.addmm_stack(dtype)}
    calls |= {"cat, then addmm_": case.cat_and_addmm, "addmm_ one by one": case.addmm_each}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls |= peft_calls(case)
        for call in calls.values():
            call()
        extra = {variant: extra_megabytes(call, device) for variant, call in calls.items()}
        seconds = interleaved(calls, repeats, 1)
    limit = 2 * sum(w.nbytes for w in case.weights) / copy_bandwidth(device)
    card = on_the_card({variant: call for variant, call in calls.items() if variant not in WAITS}, repeats)
    timed = rows_of(title(model, len(shapes), name), seconds, "addmm_ of an fp32 stack", limit)
    return [row | {"extra_mb": extra[row["variant"]], "card_ms": card.get(row["variant"])} for row in timed]


def drift(device: str, count: int = 200) -> list[dict]:
    """The error of many merges of |Δ| = 2e-4 |W| into bf16, relative to the sum of the updates, for each way of rounding."""
    rows = []
    for turning in (False, True):
        for rounding, kept in (("nearest", False), ("stochastic", False), ("nearest", True)):
            torch.manual_seed(0)
            weight = torch.randn(576, 576, device=device).bfloat16()
            exact, left = weight.double(), torch.zeros_like(weight) if kept else None
            start, a = exact.clone(), None
            for i in range(count):
                if a is None or turning:
                    a = Adapter(torch.randn(16, 576, device=device), torch.randn(576, 16, device=device), 1.0)
                    a = a * float(2e-4 * start.norm() / a.delta().norm())
                exact += a.delta()
                ops.merge_(weight, a.A, a.B, a.scale, residual=left, rounding=rounding, seed=i)
            got, moved = weight.double() + (left.double() if kept else 0), exact - start
            which = "another direction each" if turning else "one direction"
            rows.append({"case": f"{count} merges of |Δ| = 2e-4 |W| into bf16, {which}",
                         "variant": "residual" if kept else rounding,
                         "error": float((got - exact).norm() / moved.norm()),
                         "bias": float(((got - exact) * moved).sum() / moved.square().sum())})
            row = rows[-1]
            print(f"{row['case']}: {row['variant']}: error {row['error']:.2%}, bias {row['bias']:+.2%}", flush=True)
    return rows


def streamed(count: int = 10_000) -> list[dict]:
    """Peak memory of clients of rank 8 that arrive one by one, into a 576 x 1536 weight: after a tenth of them, and after all."""
    model = nn.Sequential(nn.Linear(1536, 576, bias=False))
    stream, rows = Stream(model, {"0": (576, 1536)}), []

    def add(first: int, last: int) -> None:
        for k in range(first, last):
            stream.add(Update({"0": Adapter(torch.randn(8, 1536), torch.randn(576, 8), 2.0)}, 1 + k % 9, {}, 0, f"c{k}"))

    add(0, 100)
    for first, last in ((100, count // 10), (count // 10, count)):
        extra = extra_megabytes(lambda first=first, last=last: add(first, last), "cpu")
        row = {"case": "a stream of clients of rank 8 into 576 x 1536", "variant": f"clients {first} to {last}", "extra_mb": extra}
        print(f"{row['case']}: {row['variant']}: {'?' if extra is None else f'{extra:.1f}'} MB more at the peak", flush=True)
        rows.append(row)
    stream.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", default=["7B", "4096x4096", "28672x8192"] if gpu else ["SmolLM2-135M", "2048x5632"],
                        help="names of shapes.MODELS, or OUTxIN")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if gpu else ["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    require_green("tests/test_merge.py", "tests/test_merge_many.py", "tests/test_native_merge.py")
    device = "cuda" if gpu else "cpu"
    for model, name in itertools.product(options.models, options.dtypes):
        publish("merge", measure(model, name, device, options.layers, options.repeats))
    publish("merge", drift(device) + ([] if gpu else streamed()))


if __name__ == "__main__":
    main()

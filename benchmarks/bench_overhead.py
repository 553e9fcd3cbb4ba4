"""What a call costs the host: processor time of lora_linear and its backward pass on tiny tensors, by flora and by its peers.

    python -m benchmarks.bench_overhead [--rounds 60]

Without a GPU the Triton kernels are launched on CPU tensors into nothing: what is measured is all Python of a call, the look-up
of the code included, but not CUDA's launch. With a GPU everything is.
"""
import argparse
import gc
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton

from benchmarks.gate import require_green
from benchmarks.measure import publish
from flora import kernels, ops
from flora.kernels import triton as backend
from flora.kernels.triton import launch, rule
from flora.speed import rows_of

SIZE, RANK, CLIENTS, CALLS = 16, 8, 10, 25
FORMS = {"flora, by the rule": None, "flora, our passes": rule.Form("triton", "torch"),
         "flora, fused": rule.Form("triton", "fused")}


class Nothing:
    """Stands for all compiled code: is found, is launched, does nothing."""

    def get(self, key: tuple[Any, ...]) -> "Nothing":
        hash(key)
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: None


def launch_nothing() -> None:
    if triton.knobs.runtime.interpret:
        raise SystemExit("expected kernels that are compiled; TRITON_INTERPRET is set. Unset it.")
    backend.WHEN_FORCED.update(dict.fromkeys(backend.OPERATORS, ("cpu",)))
    launch._compiled = Nothing()
    launch.driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))


def peft_layer(device: str) -> torch.nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE, bias=False, device=device))
    return inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]), model)


def variants(layers: int, clients: int, device: str) -> dict[str, Callable[[], object]]:
    """Forward and backward of so many layers that read the same x, by flora and, for one adapter, by its peers."""
    new = {"device": device}
    x, dy = torch.randn(4 * CLIENTS, SIZE, requires_grad=True, **new), torch.ones(4 * CLIENTS, SIZE, **new)
    Ws, scales = [torch.randn(SIZE, SIZE, **new)] * layers, [torch.ones(RANK * clients, **new)] * layers
    As = [torch.randn(RANK * clients, SIZE, requires_grad=True, **new) for _ in range(layers)]
    Bs = [torch.randn(SIZE, RANK * clients, requires_grad=True, **new) for _ in range(layers)]
    offsets = ops.Segments([4 * k for k in range(CLIENTS + 1)], [RANK * k for k in range(CLIENTS + 1)]) if clients > 1 else None

    def both(forward: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], None]:
        def call() -> None:
            torch.autograd.backward(forward(), [dy] * layers)
            x.grad = None
            for factor in (*As, *Bs):
                factor.grad = None
        return call

    def with_flora(form: rule.Form | None) -> Callable[[], None]:
        run = both(lambda: ops.lora_linears(x, Ws, As, Bs, scales, row_offsets=offsets))

        def call() -> None:
            rule._forced = form
            with kernels.use("triton"):
                run()
        return call

    found = {name: with_flora(form) for name, form in FORMS.items()}
    if clients == 1:
        peft = [peft_layer(device) for _ in range(layers)]
        found["addmm form"] = both(lambda: tuple(torch.addmm(torch.nn.functional.linear(x, W), x @ A.T, B.T, alpha=2.0)
                                                 for W, A, B in zip(Ws, As, Bs, strict=True)))
        found["peft"] = both(lambda: tuple(layer(x) for layer in peft))
    return found


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds a call, of all threads, the variants taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            began = time.process_time()
            for _ in range(CALLS):
                call()
            took = (time.process_time() - began) / CALLS
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 3:
                seconds[name].append(took)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    require_green("tests/test_tuning.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        launch_nothing()
    gc.disable()
    rows = []
    for case, layers, clients in (("one adapter", 1, 1), ("q, k and v in one call", 3, 1), ("ten clients", 1, CLIENTS),
                                  ("ten clients, q, k and v in one call", 3, CLIENTS)):
        seconds = measure(variants(layers, clients, device), options.rounds)
        rows += rows_of(case, seconds, "addmm form" if clients == 1 else "flora, by the rule")
    publish("overhead", rows)


if __name__ == "__main__":
    main()

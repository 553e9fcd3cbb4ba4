"""The merge of ten clients (ranks 64 to 4) into a weight: flora's operator, addmm_ on a concatenated stack, one addmm_ a client.

The limit is the copy bandwidth of this machine over the bytes of the weight, read and written once.
"""
import torch

from benchmarks.gate import require_green
from benchmarks.measure import copy_bandwidth, interleaved, publish, rows_of
from benchmarks.shapes import RANKS, SMOLLM2_135M, SQUARE
from flora import ops
from flora.adapter import Adapter, stack


def main() -> None:
    require_green("tests/test_merge.py")
    bandwidth, rows = copy_bandwidth(), []
    for dtype in (torch.float32, torch.bfloat16):
        for name, n_out, n_in in [SMOLLM2_135M[4], *SQUARE]:
            torch.manual_seed(0)
            clients = [Adapter(torch.randn(r, n_in) * 0.02, torch.randn(n_out, r) * 0.02, 2.0) * 0.1 for r in RANKS]
            whole = stack(clients)
            weights = {variant: torch.randn(n_out, n_in).to(dtype) for variant in ("flora", "addmm_ stack", "addmm_ each")}

            def one_pass(weight: torch.Tensor, whole: Adapter = whole) -> None:
                ops.merge_(weight, whole.A, whole.B, whole.scale)

            def addmm_stack(weight: torch.Tensor, whole: Adapter = whole) -> None:
                weight.addmm_((whole.B * whole.scale).to(weight.dtype), whole.A.to(weight.dtype))

            def addmm_each(weight: torch.Tensor, clients: list = clients) -> None:
                for a in clients:
                    weight.addmm_((a.B * a.scale).to(weight.dtype), a.A.to(weight.dtype))

            calls = {"flora": one_pass, "addmm_ stack": addmm_stack, "addmm_ each": addmm_each}
            seconds = interleaved({variant: (lambda c=call, w=weights[variant]: c(w)) for variant, call in calls.items()})
            limit = 2 * weights["flora"].nbytes / bandwidth
            rows += rows_of(f"{name} {n_out}x{n_in}, R = {sum(RANKS)}, {str(dtype).split('.')[1]}", seconds, "addmm_ stack", limit)
    publish("merge", rows)


if __name__ == "__main__":
    main()

"""The compiled operators: loads `flora/_native*.so` once and names what it offers.

Importing this module raises ImportError, with the reason, where the extension was not built or cannot be loaded. It
registers the operators under `torch.ops.flora_native`; nothing else may reach for that namespace.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flora.kernels import reference

_LINEAR = ("lora_linear", "lora_linear_backward", "lora_add_")
# Measured against torch's products with these instructions; without them they are not ahead, and run only when forced.
_WIDE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# With tile instructions for bfloat16 torch's products are several times as fast as ours, which have none.
_TILES = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
OPERATORS = {
    **dict.fromkeys(_LINEAR, ("cpu",) if _WIDE else ()),
    **dict.fromkeys(("merge_", "checked_merge_", "stack_"), ("cpu",)),
}
WHEN_FORCED = dict.fromkeys(_LINEAR, ("cpu",))

_BUILD = (
    "to build it: install torch>=2.10, ninja, pybind11 and a C++ compiler, "
    "then run `pip install --no-build-isolation -e .`"
)


def _load() -> Path:
    """Load the library that lies beside the package; raise ImportError saying why it cannot be."""
    folder = Path(__file__).resolve().parent.parent
    found = sorted(path for pattern in ("_native*.so", "_native*.pyd") for path in folder.glob(pattern))
    if not found:
        raise ImportError(f"the native extension is not built: no _native*.so in {folder}; {_BUILD}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ImportError(f"expected one native extension in {folder}, found {names}; remove the stale ones")
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ImportError(
            f"{found[0]} was built but does not load under torch {torch.__version__}: {reason}; {_BUILD}"
        ) from error
    missing = [name for name in OPERATORS if not hasattr(torch.ops.flora_native, name)]
    if missing:
        raise ImportError(f"{found[0]} lacks {', '.join(missing)}: it was built from other sources; {_BUILD}")
    return found[0]


LIBRARY = _load()
# A library built without nvcc has no CUDA kernels and leaves CUDA tensors to the other backends.
for _op in ("merge_", "checked_merge_", "stack_"):
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"flora_native::{_op}", "CUDA"):
        OPERATORS[_op] = ("cpu", "cuda")


def _by_tiles(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return _TILES and x.dtype == torch.bfloat16 and len(weights) > 0 and all(w.dtype == torch.bfloat16 for w in weights)


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[Tensor],
    frozen: Sequence[Tensor],
    row_offsets: Tensor | None,
    rank_offsets: Tensor | None,
    frozen_ranges: Tensor | None,
    widths: Sequence[int],
    dropout: float,
    keys: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """y_l = x W_lᵀ + bias_l + h_l B_lᵀ for every layer l that reads x, and h: as in reference.py.

    h comes from one pass over x; then a block of y meets the base product, the low-rank one and the bias in one sum,
    rounded once. fp16 is multiplied in fp32. The same bits for any number of threads, but for fewer than 32 rows in fp32 or fp64,
    whose base product is torch's own, and for bf16 on processors with tiles for it: there torch makes all products of one
    adapter, and of clients those with the weights.
    Raises RuntimeError if a shape, a dtype or a device does not fit.
    """
    if _by_tiles(x, weights):
        add_ = reference.lora_add_ if row_offsets is None else lora_add_
        return reference.on_base_products(
            add_, x, weights, biases, As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys
        )
    return torch.ops.flora_native.lora_linear.default(
        x, weights, biases, As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys
    )


def lora_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[Tensor],
    frozen: Sequence[Tensor],
    row_offsets: Tensor | None,
    rank_offsets: Tensor | None,
    frozen_ranges: Tensor | None,
    widths: Sequence[int],
    dropout: float,
    keys: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx, every dA and every dB, where `needs` asks for it: as in reference.py.

    dx sums all layers, base products and low-rank ones, in one pass over its blocks. Raises as lora_linear does.
    """
    if _by_tiles(dys[0], weights):
        rest = (frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys, needs)
        if row_offsets is None:
            return reference.lora_linear_backward(dys, x, h, weights, As, Bs, scales, *rest)
        dx, dAs, dBs = lora_linear_backward(dys, x, h, [], As, Bs, scales, *rest)
        return reference.base_gradient(dys, weights).add_(dx) if needs[0] else dx, dAs, dBs
    return torch.ops.flora_native.lora_linear_backward.default(
        dys, x, h, weights, As, Bs, scales, frozen, row_offsets, rank_offsets, frozen_ranges, widths, dropout, keys, needs
    )


def lora_add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    frozen: Sequence[Tensor],
    row_offsets: Tensor | None,
    rank_offsets: Tensor | None,
    frozen_ranges: Tensor | None,
    width: int,
    dropout: float,
    keys: Tensor | None,
) -> Tensor:
    """y += h Bᵀ in place; returns h (M, width): as in reference.py. Raises as lora_linear does."""
    return torch.ops.flora_native.lora_add_.default(
        y, x, A, B, scale, frozen, row_offsets, rank_offsets, frozen_ranges, width, dropout, keys
    )


def merge_(
    weights: Sequence[Tensor],
    residuals: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[Tensor],
    counts: Sequence[int],
    seeds: Sequence[int],
) -> None:
    """weights[l] += Σ over the clients of layer l of B diag(scale) A, in place, rounded as in reference.py.

    A tile of sums stays in registers over all ranks and meets the weight once: fp32 accumulation (fp64 for an fp64
    weight, or one of at most 4096 elements), one rounding, no dense product, no stack of the factors, the same bits for
    any number of threads. Scratch: under 1 MB for each thread.

    weights[l] (out, in); residuals: none, or one for each weight, of its shape; counts[l] clients with As (r, in),
    Bs (out, r) in fp32, fp64, fp16 or bf16 each, any strides, and scales (r,) fp32; seeds: none (round to nearest even),
    or one for each weight. Factors must not overlap what is written, nor weights and residuals each other.
    Raises RuntimeError, before it writes, if a shape, a dtype or a device does not fit. Does not bump any version counter.
    """
    if weights:
        torch.ops.flora_native.merge_.default(weights, residuals, As, Bs, scales, counts, seeds)


def checked_merge_(
    weights: Sequence[Tensor],
    residuals: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[Tensor],
    counts: Sequence[int],
    seeds: Sequence[int],
    write: bool,
) -> tuple[int, int]:
    """merge_ where nothing is wrong with its factors and `write` is set; what is wrong as in reference.py, with (3, 0) only where a
    factor does lie in what is written.

    One call for all: a round has thousands of tensors, and handing them over is most of what a check costs.
    """
    return torch.ops.flora_native.checked_merge_.default(weights, residuals, As, Bs, scales, counts, seeds, write)


def stack_(
    out_A: Tensor,
    out_B: Tensor,
    out_scale: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> None:
    """out_A, out_B, out_scale = the ranks of all adapters, one after another.

    Every line of the outputs is written once, in order; equal dtypes copy bit for bit, others convert as PyTorch does.

    out_A (R, in), out_B (out, R), out_scale (R,) fp32; As[k] (r_k, in), Bs[k] (out, r_k), scales[k] (r_k,) with
    R the sum of r_k; fp32, fp64, fp16 or bf16, any strides. The outputs must not overlap the inputs.
    Raises RuntimeError if a shape, a dtype or a device does not fit. Does not bump any version counter.
    """
    torch.ops.flora_native.stack_.default(out_A, out_B, out_scale, list(As), list(Bs), list(scales))

"""Which form a shape gets: who computes the skinny products, and whether the base product is fused with the ranks.

    skinny "torch": x Aᵀ, dy B, dhᵀ x and dyᵀ h by cuBLAS.     "triton": our passes (they alone take clients and dropout)
    base   "torch": cuBLAS, then one expand on top of it.       "fused": our GEMM with the ranks in its accumulator

What was measured on this card decides: the table that `flora tune` wrote, else the one shipped for the card, by the power of
two that each of rows, out, in and ranks rounds to: the ranks of the largest client, of all layers of the call. A shape that no
table has gets cuBLAS throughout, which is the `addmm_` form that flora never falls below; clients and dropout get our skinny
passes and cuBLAS for the base.
"""
import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SHIPPED_TABLES = Path(__file__).parent / "tuned"


class Form(NamedTuple):
    """Who computes the skinny products ("torch", "triton") and the base product ("torch", "fused")."""
    skinny: str = "torch"
    base: str = "torch"


FLOOR = Form()
FORMS = (FLOOR, Form("triton", "torch"), Form("torch", "fused"), Form("triton", "fused"))


def own_tables() -> Path:
    """Where `flora tune` writes: $FLORA_CACHE/tuned, or ~/.cache/flora/tuned."""
    return Path(os.environ.get("FLORA_CACHE") or Path.home() / ".cache" / "flora") / "tuned"


def device_key(name: str) -> str:
    """The file name of a card's table, without suffix: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shape_key(op: str, M: int, N: int, K: int, ranks: int, segmented: bool, dtype: torch.dtype) -> str:
    """The key of a table's entry, each size rounded to the nearest power of two: "forward 8192x4096x4096 r16 bfloat16"."""
    M, N, K, ranks = (1 << round(math.log2(max(n, 1))) for n in (M, N, K, ranks))
    return f"{op} {M}x{N}x{K} r{ranks} {str(dtype).split('.')[1]}" + (" clients" if segmented else "")


@functools.cache
def table(device_name: str) -> dict[str, Form]:
    """The forms measured for a card by shape_key: the user's own table, else the shipped one, else none."""
    for folder in (own_tables(), SHIPPED_TABLES):
        path = folder / f"{device_key(device_name)}.json"
        if path.exists():
            return {key: Form(*form) for key, form in json.loads(path.read_text())["forms"].items()}
    return {}


@functools.lru_cache(maxsize=4096)
def _form(op: str, M: int, N: int, K: int, ranks: int, segmented: bool, dropout: bool, dtype: torch.dtype, name: str) -> Form:
    form = table(name).get(shape_key(op, M, N, K, ranks, segmented, dtype), FLOOR)
    return Form("triton", form.base) if segmented or dropout else form


_forced: Form | None = None


@contextlib.contextmanager
def use(form: Form) -> Iterator[None]:
    """Every call gets this form while the block runs (clients and dropout still get our skinny passes)."""
    global _forced
    before, _forced = _forced, form
    try:
        yield
    finally:
        _forced = before


def form(op: str, M: int, N: int, K: int, ranks: int, segmented: bool, dropout: bool, dtype: torch.dtype,
         device: torch.device) -> Form:
    """The form of a call. op: "forward" (y from x) or "backward" (dx from dy, N and K of the weight as they are)."""
    if _forced is not None:
        return Form("triton", _forced.base) if segmented or dropout else _forced
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return _form(op, M, N, K, ranks, segmented, dropout, dtype, name)

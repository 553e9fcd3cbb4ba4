"""Which form a shape gets, and which blocks its kernels get.

    skinny "torch": x Aᵀ, dy B, dhᵀ x and dyᵀ h by cuBLAS.     "triton": our passes (they alone take clients and dropout)
    base   "torch": cuBLAS, then one expand on top of it.       "fused": our GEMM with the ranks in its accumulator

What was measured on this card decides: the table that `flora tune` wrote, else the one shipped for the card, by the power of
two that each of rows, out, in and ranks rounds to: the ranks of the largest client, of all layers of the call. A shape that no
table has gets cuBLAS throughout, which is the `addmm_` form that flora never falls below; clients and dropout get our skinny
passes and cuBLAS for the base. Its kernels get the blocks of configs.default.

A table is JSON: "about" (device, torch, triton), "forms" {shape: [skinny, base]}, "blocks" {kernel and shape: [block_m, block_n,
block_k, block_r, splits, num_warps, num_stages]}. Blocks that this version does not ship are left out.
"""
import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flora.kernels.triton import configs
from flora.kernels.triton.configs import Config

SHIPPED_TABLES = Path(__file__).parent / "tuned"


class Form(NamedTuple):
    """Who computes the skinny products ("torch", "triton") and the base product ("torch", "fused")."""
    skinny: str = "torch"
    base: str = "torch"


class Tables(NamedTuple):
    """What was measured on a card: forms by shape_key, blocks by blocks_key, and the file that says so."""
    forms: dict[str, Form]
    blocks: dict[str, Config]
    path: Path | None


FLOOR = Form()
FORMS = (FLOOR, Form("triton", "torch"), Form("torch", "fused"), Form("triton", "fused"))


def own_tables() -> Path:
    """Where `flora tune` writes: $FLORA_CACHE/tuned, or ~/.cache/flora/tuned."""
    return Path(os.environ.get("FLORA_CACHE") or Path.home() / ".cache" / "flora") / "tuned"


def device_key(name: str) -> str:
    """The file name of a card's table, without suffix: its words up to the model, so "NVIDIA H100 80GB HBM3" and "NVIDIA H100
    PCIe" are nvidia-h100. A part of a card (MIG) keeps its whole name: it has fewer multiprocessors."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    model = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words))
    return "-".join(words if "mig" in words else words[:model + 1])


def device_name(device: torch.device) -> str:
    """The card's name; "interpreter" where there is none."""
    if device.type != "cuda":
        return "interpreter"
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _card(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _rounded(*sizes: int) -> list[int]:
    """Each size as the nearest power of two."""
    return [1 << round(math.log2(max(n, 1))) for n in sizes]


def shape_key(op: str, M: int, N: int, K: int, ranks: int, segmented: bool, dtype: torch.dtype) -> str:
    """The key of a form: "forward 8192x4096x4096 r16 bfloat16", with " clients" for several."""
    M, N, K, ranks = _rounded(M, N, K, ranks)
    return f"{op} {M}x{N}x{K} r{ranks} {str(dtype).split('.')[1]}" + (" clients" if segmented else "")


def blocks_key(kernel: str, M: int, N: int, K: int, ranks: int, dtype: torch.dtype, turned: bool = False) -> str:
    """The key of a kernel's blocks: "linear 8192x4096x4096 r16 bfloat16", with " turned" where it multiplies with W, not Wᵀ. A
    kernel without outputs or inner columns has 0 of them."""
    M, N, K, ranks = (size if given else 0 for size, given in zip(_rounded(M, N, K, ranks), (M, N, K, ranks), strict=True))
    return f"{kernel} {M}x{N}x{K} r{ranks} {str(dtype).split('.')[1]}" + (" turned" if turned else "")


def _config(key: str, numbers: Any) -> Config:
    """The shipped Config of these numbers; its splits may be others. Raises ValueError, KeyError or TypeError."""
    kernel, wanted = key.split()[0], tuple(numbers)
    for config in (*configs.SHIPPED[kernel], *configs.TRIED[kernel]):
        ours = astuple(config)[:7]
        if ours[:4] + ours[5:] == wanted[:4] + wanted[5:] and type(wanted[4]) is int and 1 <= wanted[4] <= 8:
            return replace(config, splits=wanted[4])
    raise ValueError(f"blocks {list(wanted)} of {kernel}")


def read(path: Path) -> Tables:
    """A table's entries. What cannot be understood is left out with a warning: a lost measurement must not end a training run."""
    try:
        raw = json.loads(path.read_text())
        forms, blocks = dict(raw["forms"]), dict(raw.get("blocks", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: expected a table of flora tune, a JSON object with \"forms\"; got {type(error).__name__}: {error}. "
                      "It is not used. Delete it and run flora tune again.", stacklevel=2)
        return Tables({}, {}, None)
    kept, strange = Tables({}, {}, path), []
    for key, value in forms.items():
        if isinstance(value, list) and tuple(value) in FORMS:
            kept.forms[key] = Form(*value)
        else:
            strange.append(key)
    for key, value in blocks.items():
        try:
            kept.blocks[key] = _config(key, value)
        except (ValueError, KeyError, TypeError, IndexError):
            strange.append(key)
    if strange:
        warnings.warn(f"{path}: {len(strange)} of {len(forms) + len(blocks)} entries are none that this version of flora knows, "
                      f"the first for {strange[0]!r}; they are not used. Run flora tune to measure them again.", stacklevel=2)
    return kept


@functools.cache
def table(name: str) -> Tables:
    """What was measured for a card of this name: the user's own table, else the shipped one, else nothing."""
    for folder in (own_tables(), SHIPPED_TABLES):
        path = folder / f"{device_key(name)}.json"
        if path.exists():
            return read(path)
    return Tables({}, {}, None)


_measured: dict[str, Config] | None = None


def measuring(blocks: dict[str, Config] | None) -> None:
    """Every call gets these blocks in the place of the table's; None: the table's again."""
    global _measured
    _measured = blocks
    forget()


def forget() -> None:
    """Makes the next call read the tables again."""
    for remembered in (table, _form, blocks):
        remembered.cache_clear()


@functools.lru_cache(maxsize=4096)
def _form(op: str, M: int, N: int, K: int, ranks: int, segmented: bool, dropout: bool, dtype: torch.dtype, name: str) -> Form:
    form = table(name).forms.get(shape_key(op, M, N, K, ranks, segmented, dtype), FLOOR)
    return Form("triton", form.base) if segmented or dropout else form


@functools.lru_cache(maxsize=4096)
def blocks(kernel: str, M: int, N: int, K: int, ranks: int, dtype: torch.dtype, device: torch.device,
           turned: bool = False) -> Config:
    """The blocks of a kernel's call: what was measured to be fastest, where the card has the shared memory, else the default."""
    measured = table(device_name(device)).blocks if _measured is None else _measured
    found = measured.get(blocks_key(kernel, M, N, K, ranks, dtype, turned))
    if found is None or not configs.fits(found, device) or (kernel == "dy_pass" and found.block_r < ranks):
        return configs.default(kernel, M, N, K, ranks, dtype, device)
    return found


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
    return _form(op, M, N, K, ranks, segmented, dropout, dtype, device_name(device))

"""How speed is measured: variants interleaved, medians and quartiles, ratios in one run, and what this machine could do at most."""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# What a row may hold besides its time: the column's title and how the number is written.
COLUMNS = {"card_ms": ("card ms", ".3f"), "tokens_per_second": ("tokens/s", ".0f"), "steady_tokens_per_second": ("steady", ".0f"),
           "aggregate_ms": ("aggregate", ".0f"), "merge_ms": ("merge", ".0f"), "train_ms": ("train", ".0f"),
           "peak_mb": ("peak MB", ".0f"), "extra_mb": ("extra MB", ".1f"), "up_mb": ("MB up", ".0f"), "down_mb": ("MB down", ".0f"),
           "told_mb": ("MB told", ".0f"), "wire_mb": ("MB wire", ".0f")}


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int = 15, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every call, the variants taking turns, so that a slow spell of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + repeats):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def on_the_card(variants: Mapping[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Median milliseconds that every call takes a GPU, without what the host takes to launch it; variants take turns. Empty where
    there is no GPU. Not for calls that wait for it."""
    if not torch.cuda.is_available():
        return {}
    from flora.kernels.triton.tune import card_seconds
    host = {name: interleaved({name: call}, 1, 1)[name][0] for name, call in variants.items()}
    turns = [{name: card_seconds(call, 1, host[name]) for name, call in variants.items()} for _ in range(repeats)]
    return {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in variants}


def rows_of(case: str, seconds: Mapping[str, list[float]], against: str, limit: float | None = None) -> list[dict[str, Any]]:
    """One row a variant: median and quartiles in ms, its time as a multiple of that of the variant `against` and of the limit
    (seconds)."""
    base = statistics.median(seconds[against])
    out = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values if len(values) > 1 else values * 2, n=4, method="inclusive")
        out.append({"case": case, "variant": name, "ms": middle * 1e3, "ms_low": low * 1e3, "ms_high": high * 1e3,
                    "against": against, "times_against": middle / base, "times_limit": middle / limit if limit else None})
    return out


def device_name() -> str:
    """The card's name, or how many cores the CPU run used."""
    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else f"cpu-{torch.get_num_threads()}-threads"


def matmul_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second of a large square product in this dtype: the limit of what a product can reach."""
    n = 8192 if device == "cuda" else 1536
    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)
    return 2 * n**3 / statistics.median(interleaved({"product": lambda: a @ b}, 7, 2)["product"])


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second, read plus written, of copying 256 MB: the limit of what a merge can reach."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    values = interleaved({"copy": lambda: target.copy_(source)}, 7, 2)["copy"]
    return 2 * source.nbytes / statistics.median(values)


def roofline(shapes: Sequence[tuple[str, int, int]], num_rows: int, rank: int, itemsize: int, limits: tuple[float, float],
             backward: bool) -> float:
    """Seconds of the ideal split: per linear, each pass bound by its operations or by its bytes, every tensor moved once a pass.

    shapes: (name, out, in); limits: operations and bytes a second."""
    (peak, bandwidth), seconds = limits, 0.0
    for _, N, K in shapes:
        M, R = num_rows, rank
        base, skinny = 2 * M * N * K, 2 * M * R
        passes = [(base + skinny * N, M * K + M * N + N * K), (skinny * K, M * K)]                 # y with h Bᵀ; h
        if backward:
            passes += [(base + skinny * K, M * K + M * N + N * K), (2 * skinny * N, M * N), (skinny * K, M * K)]
        seconds += sum(max(operations / peak, elements * itemsize / bandwidth) for operations, elements in passes)
    return seconds


def show(console: Console, case: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of a case, with the columns that its rows have."""
    table = Table(title=case, title_justify="left", box=None)
    extra = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    table.add_column("variant", min_width=36 if len(extra) < 3 else 8)
    for column in ("ms", "quartiles", "x peer", "x limit", *(COLUMNS[key][0] for key in extra)):
        table.add_column(column, justify="right", min_width=8 if len(extra) < 3 else 6, no_wrap=True)
    for row in rows:
        limit, star = row["times_limit"], "*" * (row["variant"] == row["against"])
        digits = 3 if row["ms"] < 1000 else 0
        numbers = ("–" if row.get(key) is None else format(row[key], COLUMNS[key][1]) for key in extra)
        table.add_row(row["variant"], f"{row['ms']:.{digits}f}", f"{row['ms_low']:.{digits}f} – {row['ms_high']:.{digits}f}",
                      f"{row['times_against']:.2f}{star}", f"{limit:.2f}" if limit else "–", *numbers)
    console.print(table)

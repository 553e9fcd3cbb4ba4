"""How every benchmark measures: variants interleaved, medians and quartiles, ratios in one run, JSON beside the table."""
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flora import kernels

RESULTS = Path(__file__).parent / "results"


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


def rows_of(case: str, seconds: Mapping[str, list[float]], against: str, limit: float | None = None) -> list[dict]:
    """One row a variant: median and quartiles in ms, its time as a multiple of that of the variant `against` and of the limit
    (seconds)."""
    base = statistics.median(seconds[against])
    out = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
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


def publish(name: str, rows: list[dict], others: list[dict] | None = None) -> None:
    """Prints a table a case and writes benchmarks/results/<device>/<name>.json with the versions that it depends on, and `others`,
    rows that are not times."""
    console = Console(width=132, highlight=False)
    console.print(f"{name} on {device_name()}; ms: median (quartiles); x peer: times that of the variant "
                  "marked *; x limit: times the limit")
    for case in dict.fromkeys(row["case"] for row in rows):
        table = Table(title=case, title_justify="left", box=None)
        memory = any(row.get("extra_mb") is not None for row in rows if row["case"] == case)
        for column in ("variant", "ms", "quartiles", "x peer", "x limit", *(("extra MB",) if memory else ())):
            table.add_column(column, justify="left" if column == "variant" else "right", min_width=36 if column == "variant" else 8)
        for row in (row for row in rows if row["case"] == case):
            limit, star = row["times_limit"], "*" * (row["variant"] == row["against"])
            table.add_row(row["variant"], f"{row['ms']:.3f}", f"{row['ms_low']:.3f} – {row['ms_high']:.3f}",
                          f"{row['times_against']:.2f}{star}", f"{limit:.2f}" if limit else "–",
                          *((f"{row['extra_mb']:.1f}",) if memory else ()))
        console.print(table)
    folder = RESULTS / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
             "kernels": [choice._asdict() for choice in kernels.table()]}
    (folder / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows + (others or [])}, indent=1) + "\n")

"""`flora doctor`: what this machine has, which kernel runs each operator, what is missing and what that costs."""
import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from flora import kernels
from flora.allocator import keep_large_blocks

COSTS = {
    "transformers": "no causal LM can be loaded by name; the layers and the algebra work on your own modules",
    "datasets": "no json, jsonl, parquet, csv or hub data in `flora run`",
    "gguf": "no .gguf model, so `flora fetch smollm2-135m` cannot be unpacked",
    "peft": "adapters are still written in PEFT's format; comparing with PEFT is not possible here",
    "triton": "no fused GPU kernels: GPU products run as separate PyTorch calls",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tools() -> list[tuple[str, str | None, str]]:
    """(name, where or which, what its absence costs) of compilers and cards."""
    import torch

    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return [("C++ compiler", compiler, "the native operators cannot be built; merges run on the reference"),
            ("ninja", shutil.which("ninja") or _version("ninja"), "the native operators cannot be built"),
            ("nvcc", shutil.which("nvcc"), "no CUDA operators can be built; GPU merges run on the reference"),
            ("NVIDIA GPU", card, "everything runs on the CPU, in float32: fine for models of some hundred million weights")]


def _host() -> tuple[str | None, str]:
    """The host extension: CPU features, or why it is not there."""
    try:
        host = importlib.import_module("flora._host")
    except ImportError as error:
        return None, f"not built ({error}); large tensors fault their pages in at every step: training is slower on a CPU"
    return ", ".join(name for name, here in host.cpu_features().items() if here) or "none of note", ""


def _tuned() -> list[tuple[str, str | None, str]]:
    """Which table of `flora tune` the GPU's kernels go by; nothing to say where there is no GPU or no Triton."""
    import torch

    if not torch.cuda.is_available() or kernels._load("triton")[0] is None:
        return []
    from flora.kernels.triton import rule
    forms, blocks, path = rule.table(rule.device_name(torch.device("cuda")))
    found = None if path is None else f"{path}: {len(forms)} forms, {len(blocks)} blocks"
    return [("table of flora tune", found, "one adapter runs as cuBLAS calls, and our kernels with blocks that were not measured")]


def diagnose() -> list[tuple[str, str | None, str]]:
    """(part, what is here or None, what its absence costs) of this machine; flora.kernels.table() says what runs each operator."""
    import torch

    found: list[tuple[str, str | None, str]] = [("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", "")]
    found += [(package, _version(package), cost) for package, cost in COSTS.items()]
    found += _tools() + _tuned()
    found.append(("host extension", *_host()))
    why = keep_large_blocks()
    return [*found, ("allocator", None if why else "keeps large blocks (flora run sees to it)",
                     f"as it comes: {why}; large tensors fault their pages in at every step: training is slower on a CPU")]


def show() -> None:
    """Prints the tables."""
    console = Console()
    parts = Table(title="what is here", title_justify="left")
    for column in ("part", "found", "without it"):
        parts.add_column(column)
    for part, found, cost in diagnose():
        parts.add_row(part, found or "[red]missing[/red]", "" if found else cost)
    console.print(parts)
    table = Table(title="which code runs an operator", title_justify="left")
    for column in ("operator", "device", "backend", "why"):
        table.add_column(column)
    for choice in kernels.table():
        table.add_row(*choice)
    console.print(table)

"""What a result depends on: versions, processor or card, threads, the commit of flora's source, which kernel runs each operator."""
import contextlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flora import kernels

PACKAGES = ("flora", "torch", "triton", "transformers", "peft", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """What environment.json of a run and every file of benchmarks/results hold. commit: of flora's source tree ("-dirty" after it:
    with changes), or $FLORA_COMMIT where the tree came without its history; None where it is neither. driver, cuda: of a card."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__                               # with its build: +cpu, +cu130
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    driver = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if card else None
    return {"versions": versions, "commit": _commit(), "machine": platform.machine(), "threads": torch.get_num_threads(),
            "gpu": card, "driver": driver.splitlines()[0] if driver else None, "cuda": torch.version.cuda if card else None,
            "kernels": [choice._asdict() for choice in kernels.table()]}


def _commit() -> str | None:
    tree = Path(__file__).resolve().parents[1]
    told = os.environ.get("FLORA_COMMIT")
    if told or not (tree / ".git").exists():
        return told
    return _said(["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])


def _said(command: Sequence[str]) -> str | None:
    """What a command prints; None where it cannot be run, fails or says nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return None

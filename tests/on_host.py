"""Compiles csrc/cuda for the host, on which tests/cuda_on_host stands in for CUDA: the kernels' own code, run on CPU tensors."""
import os
import shutil
import subprocess
from pathlib import Path

import torch
from tiny import ROOT
from torch.utils import cpp_extension

STAND_IN = ROOT / "tests" / "cuda_on_host"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
CXX = shutil.which("g++")


def build(folder: Path) -> Path:
    """The library of torch.ops.flora_on_host, made in the folder; with sanitizers where ON_HOST_SANITIZED is set."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(STAND_IN / "ptx.cuh", folder / "csrc" / "cuda")
    for source in (folder / "csrc" / "cuda").iterdir():                # what asks torch for a card asks for the host
        lines = source.read_text(encoding="utf-8").replace("t.is_cuda()", "t.is_cpu()").splitlines(keepends=True)
        source.write_text("".join(line for line in lines if "DeviceGuard guard" not in line), encoding="utf-8")
    library = folder / "on_host.so"
    includes = [f"-I{STAND_IN}", f"-I{folder / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-O2", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-DFLORA_WITH_CUDA",
             "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", *(SANITIZERS if os.environ.get("ON_HOST_SANITIZED") else [])]
    done = subprocess.run([CXX, *flags, *includes, str(STAND_IN / "operators.cpp"), *libraries, "-o", str(library)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def sanitized() -> dict[str, str]:
    """The environment of a process that builds and loads the library with sanitizers."""
    runtimes = [subprocess.run([CXX, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
                for name in ("asan", "ubsan")]
    return os.environ | {"ON_HOST_SANITIZED": "1", "LD_PRELOAD": " ".join(runtimes),
                         "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}

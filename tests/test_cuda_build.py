"""Every CUDA source compiles for every generation of card that it is written for, without a spilled register."""
import re
import shutil
import subprocess

import pytest
import torch
from tiny import ROOT
from torch.utils import cpp_extension

NVCC = shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc") or shutil.which("nvcc")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}              # bytes that one block can have
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-Werror", "all-warnings", "--threads", "2", "-DUSE_CUDA",
         "-DFLORA_WITH_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", *cpp_extension.COMMON_NVCC_FLAGS]


def kernels_of(report):
    """(kernel, card, spilled bytes, registers, shared bytes) of every kernel in what ptxas -v wrote."""
    found = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:
        mangled, arch = re.match(r"'(\S+)' for '(\S+)'", entry).groups()
        name, numbers = re.findall(r"\d+([a-z][a-z_]+?)(I(?:Li\d+E)+E)?E?v?PK", mangled)[-1]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", entry)))
        used = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        label = f"{name}<{', '.join(re.findall(r'Li([0-9]+)E', numbers))}>" if numbers else name
        found.append((label, arch, spilled, int(used[1]), int(shared[1]) if shared else 0))
    return found


def test_there_are_cuda_sources():
    assert {path.stem for path in SOURCES} >= {"finite", "merge", "stack"}


@pytest.mark.skipif(NVCC is None, reason="no nvcc here: that the CUDA sources compile without spills was not tested")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path, capsys):
    cards = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in SHARED]
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    done = subprocess.run([NVCC, "-c", str(source), "-o", str(tmp_path / "out.o"), *FLAGS, *cards, *includes],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"under torch {torch.__version__}:\n{done.stdout}{done.stderr}"
    kernels = kernels_of(done.stdout + done.stderr)
    with capsys.disabled():
        print()
        for name, arch, spilled, registers, shared in kernels:
            print(f"  {name:16} {arch:7} {registers:4} registers {spilled:5} bytes spilled {shared:7} bytes static shared")
    written = len(re.findall(r"__global__", source.read_text(encoding="utf-8")))
    for arch, most in SHARED.items():
        of_arch = [kernel for kernel in kernels if kernel[1] == arch]
        assert len(of_arch) >= written, f"{arch}: expected {written} kernels or more, got {of_arch}"
        assert not [k for k in of_arch if k[2]], f"{arch}: registers are spilled: {[k for k in of_arch if k[2]]}"
        assert not [k for k in of_arch if k[4] > most], f"{arch}: expected at most {most} bytes of shared memory, got {of_arch}"

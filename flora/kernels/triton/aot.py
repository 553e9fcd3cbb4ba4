"""Compiles every kernel with every shipped configuration ahead of time, without a GPU, and reads what the compiler made of it.

Arguments are typed and aligned as the launches type and align them (contiguous rows, sizes divisible by 16), or the code
measured would not be the code run.
"""
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flora.kernels.triton.configs import GATHERED, SHIPPED, TRIED, Config
from flora.kernels.triton.grads import dy_pass_kernel, gather_kernel, outer_kernel
from flora.kernels.triton.linear import linear_kernel
from flora.kernels.triton.shrink import shrink_kernel, sum_splits_kernel

# arch -> the shared memory that a block may have, in bytes; what every one of them gives
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
EVERY_CARD = min(SHARED_LIMIT.values())
LINEAR = ("linear", "linear_parts", "expand", "expand_parts")
KERNELS = {"shrink": shrink_kernel, "sum_splits": sum_splits_kernel, **dict.fromkeys(LINEAR, linear_kernel),
           "outer": outer_kernel, "dy_pass": dy_pass_kernel, "gather": gather_kernel}
INNER_STRIDES = {"shrink": ("sx_k", "sa_k"), **dict.fromkeys(LINEAR, ("sx_k", "sw_k", "sb_r", "sg_r")), "outer": ("sq_c",),
                 "dy_pass": ("sb_n",), "gather": ("so_c",)}
# The other layout that calls have: dx from W and A as they lie, dh from a B of contiguous rows.
TURNED_STRIDES = {"shrink": ("sx_k", "sa_r"), **dict.fromkeys(LINEAR, ("sx_k", "sw_n", "sb_n", "sg_n")), "dy_pass": ("sb_r",)}
# What a call may have beside one adapter.
FLAGS = {"shrink": ("TABLE", "DROPOUT"), "outer": ("TABLE", "DROPOUT"), "dy_pass": ("TABLE",),
         **dict.fromkeys(LINEAR, ("SEGMENTED", "FROZEN", "F_SEGMENTED", "DROPOUT"))}


class Case(NamedTuple):
    """One compilation: a kernel, its blocks, the variant's flags, dtypes ("bf16", "fp32") of x and of the factors, and whether the
    factors lie the other way."""
    kernel: str
    config: Config
    variant: str
    flags: dict[str, object]
    x: str
    factors: str
    arch: int
    turned: bool = False


def cases() -> Iterator[Case]:
    """Every configuration in bfloat16: for one adapter, or ("_parts", and again where a kernel has no such form) for clients with
    dropout, frozen ranks and fp32 factors, each in both layouts of the factors; the first also in fp32, which it alone computes.

    Cards with less shared memory than their elder compile the same code: for them, only kernels that one of their limits changes.
    """
    alone = {"linear": {"BASE": True, "BIAS": True}, "expand": {"BASE": False, "BIAS": False}}
    for arch, limit in SHARED_LIMIT.items():
        lesser = limit < SHARED_LIMIT[80]
        for kernel, shipped in SHIPPED.items():
            configs = (*shipped, *TRIED[kernel])
            if lesser and all(config.shared <= limit or config.arch > arch for config in configs):
                continue
            parts = kernel.endswith("_parts")
            for number, config in enumerate(configs):
                if config.arch > arch or config.shared > limit:
                    continue
                many = {**alone.get(kernel.removesuffix("_parts"), {}), **dict.fromkeys(FLAGS[kernel], True)}
                if kernel in ("shrink", "dy_pass"):
                    many["SPLITS"] = config.splits
                elif kernel == "outer":
                    many["CHUNK"] = config.block_k
                one = {**many, **dict.fromkeys(FLAGS[kernel], False)}
                turns = (False, True) if kernel in TURNED_STRIDES and not lesser else (False,)
                if not parts:
                    yield from (Case(kernel, config, "one adapter", one, "bf16", "bf16", arch, turned) for turned in turns)
                if number == 0:
                    yield from (Case(kernel, config, "fp32", many if parts else one, "fp32", "fp32", arch, turned)
                                for turned in turns)
                if parts or kernel not in LINEAR:
                    yield from (Case(kernel, config, "clients", many, "bf16", "fp32", arch, turned) for turned in turns)
        if lesser:
            continue
        yield Case("sum_splits", Config(32, 0, 0, 16), "clients", {"TABLE": True, "SPLITS": 4}, "bf16", "fp32", arch)
        yield Case("gather", Config(0, GATHERED, 0, 16), "clients", {"TABLE": True}, "bf16", "fp32", arch)


def _pointers(case: Case) -> dict[str, str | None]:
    """The element type of every pointer argument; None: not given."""
    x, f, flags = case.x, case.factors, case.flags
    table = "i32" if flags.get("TABLE") else None
    keys = "i64" if flags.get("DROPOUT") else None
    clients, frozen = "i32" if flags.get("SEGMENTED") else None, flags.get("FROZEN")
    base = flags.get("BASE")
    return {
        "shrink": {"x": x, "A": f, "scale": "fp32", "h": "fp32" if flags.get("SPLITS", 1) > 1 else x, "table": table, "keys": keys},
        "sum_splits": {"parts": "fp32", "scale": "fp32", "h": x, "table": table},
        "linear": {"x": x if base else None, "w": x if base else None, "bias": x if flags.get("BIAS") else None, "y": x, "h": x,
                   "b": f, "hf": x if frozen else None, "bf": f if frozen else None, "clients": clients, "spans": clients,
                   "f_clients": clients, "keys": keys},
        "outer": {"p": x, "q": x, "parts": "fp32", "table": table, "keys": keys},
        "dy_pass": {"dy": x, "b": f, "scale": "fp32", "h": x, "dh": "fp32" if flags.get("SPLITS", 1) > 1 else x, "parts": "fp32",
                    "table": table},
        "gather": {"parts": "fp32", "out": f, "chunks": table},
    }["linear" if case.kernel in LINEAR else case.kernel]


def _source(case: Case) -> ASTSource:
    """The kernel with the types, constants and alignments that a launch gives it."""
    kernel, config = KERNELS[case.kernel], case.config
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k or 16, "BLOCK_R": config.block_r}
    inner = (TURNED_STRIDES if case.turned else INNER_STRIDES).get(case.kernel, ())
    pointers, loose = _pointers(case), {kernel.arg_names[n] if isinstance(n, int) else n for n in kernel.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in blocks or name in case.flags:
            signature[name], constants[name] = "constexpr", blocks.get(name, case.flags.get(name))
        elif name in pointers and pointers[name] is None:
            signature[name], constants[name] = "constexpr", None
        elif name in inner:
            signature[name], constants[name] = "constexpr", 1
        elif name == "grow":
            signature[name] = "fp32"
        else:
            signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
            if name not in loose:
                attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_case(case: Case) -> dict[str, object]:
    """{kernel, config, arch, registers, spilled_bytes, shared_bytes, wgmma} of one case."""
    config = case.config
    compiled = triton.compile(_source(case), target=GPUTarget("cuda", case.arch, 32),
                              options={"num_warps": config.num_warps, "num_stages": config.num_stages})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    sizes = "x".join(str(n) for n in (config.block_m, config.block_n, config.block_k, config.block_r))
    text = f"{sizes} splits {config.splits} warps {config.num_warps} stages {config.num_stages}, {case.variant}"
    text += ", turned" * case.turned
    return {"kernel": case.kernel, "config": text, "arch": f"sm_{case.arch}", "registers": usage["REG"],
            "spilled_bytes": usage["STACK"] + usage["LOCAL"], "shared_bytes": compiled.metadata.shared,
            "wgmma": compiled.asm["ptx"].count("wgmma.mma_async")}


def faults(case: Case, result: dict[str, object]) -> list[str]:
    """What must not be shipped: spilled registers, more shared memory than the card has, a large tile without tensor cores."""
    found = []
    if result["spilled_bytes"]:
        found.append(f"spills {result['spilled_bytes']} bytes")
    allowed = min(case.config.shared or EVERY_CARD, SHARED_LIMIT[case.arch])
    if result["shared_bytes"] > allowed:
        found.append(f"wants {result['shared_bytes']} bytes of shared memory, its Config.shared and sm_{case.arch} allow {allowed}")
    matrix = case.kernel in SHIPPED and case.x == "bf16" and case.config.block_m >= 64
    if case.arch == 90 and matrix and not result["wgmma"]:
        found.append("has no wgmma")
    return found


def compile_all(processes: int | None = None) -> Iterator[tuple[Case, dict[str, object]]]:
    """(case, result) of every case, as they come, in order."""
    every = list(cases())
    with ProcessPoolExecutor(processes) as pool:
        yield from zip(every, pool.map(compile_case, every), strict=True)

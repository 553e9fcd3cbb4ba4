"""Build the optional extensions `flora._native` (LibTorch stable ABI) and `flora._host` (pybind11).

Metadata lives in pyproject.toml. An extension that cannot be built is left out, loudly, and flora runs on its reference
backend. Environment: FLORA_REQUIRE_NATIVE=1 makes that an error, FLORA_NATIVE=0 leaves both out (a wheel of Python alone, for
every platform), FLORA_CUDA=0 leaves the CUDA sources out, MAX_JOBS bounds the compilers that run at once, TORCH_CUDA_ARCH_LIST
names the GPUs to build for (else those of this machine).
"""

import os
import sys
import traceback
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FLORA_REQUIRE_NATIVE") == "1"
WANTED = os.environ.get("FLORA_NATIVE") != "0"
# The oldest torch that can load the binary; everything used from torch/csrc/stable exists there.
TORCH_TARGET = "0x020a000000000000ULL"
# Contraction into fused multiply-adds is what the matrix kernels are made of. No -march: they choose at run time.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
BAR = "*" * 100


def give_up(what, reason):
    """Say on stderr what is lost, why, and how to get it; raise if FLORA_REQUIRE_NATIVE=1."""
    lost = {
        "flora._native": "the compiled CPU and CUDA operators (flora falls back to its slower reference backend)",
        "flora._host": "processor detection and allocator tuning",
    }
    print(
        f"{BAR}\nWARNING: {what} was NOT built: {reason}\n"
        f"  Lost: {lost[what]}.\n"
        "  To build it: install torch>=2.10, ninja, pybind11 and a C++ compiler (g++ or clang++), then run\n"
        f"      pip install --no-build-isolation -e .\n{BAR}",
        file=sys.stderr,
        flush=True,
    )
    if REQUIRED:
        raise SystemExit(f"FLORA_REQUIRE_NATIVE=1 and {what} was not built: {reason}")


def sources(pattern):
    """The files under csrc that match, relative to this folder, as setuptools wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def native_extension():
    """`flora._native`, or None (after saying why) where torch is missing or too old."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return give_up("flora._native", f"torch cannot be imported ({error})")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return give_up("flora._native", f"torch {torch.__version__} is older than 2.10")
    cuda_sources = sources("cuda/*.cu")
    nvcc = Path(cpp_extension.CUDA_HOME or "/nonexistent") / "bin" / "nvcc"
    cuda = bool(cuda_sources) and bool(torch.version.cuda) and nvcc.exists() and os.environ.get("FLORA_CUDA") != "0"
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
    if cuda:
        macros += [("FLORA_WITH_CUDA", None), ("USE_CUDA", None)]
        if not torch.cuda.is_available():
            # cpp_extension builds for the cards it sees; without one: from sm_80 on, newer cards through PTX.
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return make(
        name="flora._native",
        sources=["csrc/api.cpp", *sources("cpu/*.cpp"), *(cuda_sources if cuda else [])],
        depends=[*sources("*.h"), *sources("cpu/*.h"), *sources("cuda/*.cuh")],
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20"]},
        py_limited_api=True,
    )


def host_extension():
    """`flora._host`, or None (after saying why) where pybind11 is missing."""
    try:
        import pybind11
    except ImportError as error:
        return give_up("flora._host", f"pybind11 cannot be imported ({error})")
    return Extension(
        name="flora._host",
        sources=["csrc/host.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )


def tolerant(base):
    """The given build_ext, made to leave out an extension that fails instead of failing with it."""

    class BuildExt(base):
        """Builds what can be built; prints every failure, and raises it if FLORA_REQUIRE_NATIVE=1."""

        def initialize_options(self):
            super().initialize_options()
            self.built, self.failed = [], []

        def run(self):
            super().run()
            # Now that `inplace` is restored, this is the source tree.
            for extension in self.failed:
                self.discard(extension)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                traceback.print_exc()
                for extension in self.extensions:
                    if extension not in self.built + self.failed:
                        self.fail(extension, error)
            # Later steps copy the result of every extension listed, so those without one must go.
            self.extensions = [extension for extension in self.extensions if extension in self.built]

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                traceback.print_exc()
                self.fail(extension, error)
            else:
                self.built.append(extension)

        def fail(self, extension, error):
            self.failed.append(extension)
            self.discard(extension)
            give_up(extension.name, f"its compilation failed, see above ({type(error).__name__}: {error})")

        def discard(self, extension):
            """Remove what an earlier build left: a stale binary would pass for this one."""
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    return BuildExt


if REQUIRED and not WANTED:
    raise SystemExit("expected FLORA_REQUIRE_NATIVE=1 or FLORA_NATIVE=0; got both. Unset one.")
native, host = (native_extension(), host_extension()) if WANTED else (None, None)
if native is None:
    from setuptools.command.build_ext import build_ext
else:
    from torch.utils.cpp_extension import BuildExtension as build_ext
setup(
    ext_modules=[extension for extension in (native, host) if extension is not None],
    cmdclass={"build_ext": tolerant(build_ext)},
    # The operators load under every Python from 3.10 on; flora._host, optional, under the one that built it.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

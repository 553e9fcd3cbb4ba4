"""Run as a program: the launches of a call, through Triton's own compiler and launch code for sm_90, on a driver that does nothing.

Prints what our launches passed on and what Triton's own launch of the same kernels passes on: they have to be the same.
"""
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)                         # before a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget

from flora import ops
from flora.kernels import triton as backend
from flora.kernels import use
from flora.kernels.triton import launch, rule

passed = []


class Driver:
    """A card of compute capability 9.0, of which nothing but the launches is asked."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232_448}

        @staticmethod
        def load_binary(name, *rest):
            return 1, name, 0, 0, 1024

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        def launched(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            told = [[str(a.dtype), a.data_ptr()] if isinstance(a, torch.Tensor) else a for a in args]
            passed.append([function, [x, y, z], stream, list(packed), told])
        return launched


triton.runtime.driver.set_active(Driver())


def by_triton(kernel, grid, tensors, loose, sizes, constants, num_warps=4, num_stages=3):
    """launch.launch as Triton does it."""
    kernel[grid](*tensors, *loose, *sizes, *constants, num_warps=num_warps, num_stages=num_stages)


def main():
    backend.WHEN_FORCED.update(dict.fromkeys(backend.OPERATORS, ("cpu",)))
    both = []

    def twice(*given):
        for each in (launch.launch, by_triton):
            each(*given)
        both.append(passed[-2:])
    x, W, A, B = (torch.randn(shape, requires_grad=True) for shape in ((300, 64), (48, 64), (4, 64), (48, 4)))

    def call():
        ops.lora_linear(x, W, A, B, torch.ones(4), dropout=0.5, seed=1).backward(torch.ones(300, 48))

    with use("triton"), rule.use(rule.Form("triton", "fused")):
        with launch.ahead(2) as count:
            call()
        assert not passed, "something was launched"
        for name in ("shrink", "grads", "linear"):
            sys.modules[f"flora.kernels.triton.{name}"].launch = twice
        call()
    print(json.dumps({"ahead": count[0], "compiled": len(launch._compiled), "launches": both}))


if __name__ == "__main__":
    main()

"""Launches: a kernel is compiled once for each kind of arguments, and found again by what its code depends on.

Triton's own launch looks at every argument of every call, which took 15 to 19 us of Python a launch; a key of the pointers' types
and alignments, of the sizes that Triton specialises on and of the constants takes 4 us. Numbers that no code depends on
(do_not_specialize) are left out of the key, so a batch of another number of rows finds the same code.

Code can also be compiled ahead of a call, on all cores: see `ahead`.
"""
import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)
MOST = 4096                                                     # kinds of arguments that are remembered
_compiled: dict[tuple[Any, ...], Any] = {}
_queue: "_Queue | None" = None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv takes 2 us on the host.)"""
    return -(-a // b)


class _Pointer:
    """What a compiler sees of a tensor: its type, and whether its address is a multiple of 16."""

    def __init__(self, tensor: Tensor):
        self.dtype, self.address = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self.address


class _Queue:
    """What is being compiled by threads."""

    def __init__(self, threads: int | None):
        self.pool, self.pending = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))), dict[tuple[Any, ...], Future[Any]]()

    def add(self, key: tuple[Any, ...], kernel: Any, args: tuple[Any, ...], options: dict[str, int]) -> None:
        if key in self.pending:
            return
        stand_ins = [_Pointer(a) if isinstance(a, Tensor) else a for a in args]

        def compiled() -> Any:
            if torch.cuda.is_available():
                torch.cuda.set_device(key[1])                   # a thread of its own begins on the first card
            code = kernel.warmup(*stand_ins, grid=(1,), **options)
            code.run                                            # noqa: B018 (loads it, and compiles what launches it)
            return code
        self.pending[key] = self.pool.submit(compiled)

    def finish(self) -> int:
        """Keeps what was compiled; raises the first error, if there was one."""
        failed = [future.exception() for future in self.pending.values() if future.exception()]
        _compiled.update({key: future.result() for key, future in self.pending.items() if not future.exception()})
        if failed:
            raise failed[0]
        return len(self.pending)


@contextlib.contextmanager
def ahead(threads: int | None = None) -> Iterator[list[int]]:
    """Calls inside the block launch nothing: what they would launch is compiled, by so many threads (None: one a core), and is
    there when the block ends. Their results are not to be used. Yields a list that then holds how many kernels were compiled."""
    global _queue
    before, _queue = _queue, _Queue(threads)
    count: list[int] = []
    try:
        yield count
        count.append(_queue.finish())
    finally:
        _queue.pool.shutdown(cancel_futures=True)
        _queue = before


def launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], loose: tuple[float, ...], sizes: tuple[int, ...],
           constants: tuple[int, ...], num_warps: int = 4, num_stages: int = 3) -> None:
    """kernel[grid](*tensors, *loose, *sizes, *constants) on the current device and stream; the kernel's parameters have this order.

    loose: ints that it does not specialise on, and floats. sizes: ints that it does. constants: its constexprs.
    """
    args = (*tensors, *loose, *sizes, *constants)
    if INTERPRETED:
        kernel[grid](*args)
        return
    kinds = [None if t is None else (t.dtype, not t.data_ptr() % 16) for t in tensors]
    key = (id(kernel), driver.active.get_current_device(), sizes, constants, num_warps, num_stages, *kinds)
    code = _compiled.get(key)
    if code is None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if _queue is not None:
            _queue.add(key, kernel, args, options)
            return
        if len(_compiled) >= MOST:
            _compiled.clear()                                   # Triton still has the code: finding it again costs one slow launch
        code = _compiled[key] = kernel.warmup(*args, grid=grid, **options)
    if _queue is None:
        code[grid if len(grid) == 3 else (*grid, 1, 1)](*args)

"""Where tensors lie: what in-place operators must know before they write."""
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from flora.checks import check


def _interval(tensor: Tensor) -> tuple[int, int]:
    """[first, behind last) byte address of its elements; strides of torch are never negative."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _interleaved(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices lie in each other's gaps and share no byte: blocks of columns of one matrix, or of its transpose."""
    if one.stride() != other.stride() or one.dim() != 2 or one.element_size() != other.element_size():
        return False
    wide, narrow = (0, 1) if one.stride(0) >= one.stride(1) else (1, 0)
    step, near = one.stride(wide), one.stride(narrow)
    inside = (other.data_ptr() - one.data_ptr()) // one.element_size() % max(1, step)
    return one.shape[narrow] * near <= inside and inside + other.shape[narrow] * near <= step


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, by a rule that all but contrived layouts obey: strides that clear what is inside."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_apart(written: Sequence[Tensor], what: Sequence[str]) -> list[tuple[int, int]]:
    """Raises AdapterError where two of the tensors, or two elements of one, share memory. Returns their intervals, sorted."""
    for tensor, name in zip(written, what, strict=True):
        if _overlaps_itself(tensor):
            check(name, False, "a tensor that owns each of its elements (clone it first)", f"strides {tensor.stride()}")
    spans = sorted((*_interval(t), i) for i, t in enumerate(written) if t.numel())
    begun: list[tuple[int, int]] = []                           # (stop, which) of those that end behind the one at hand
    for start, stop, i in spans:
        begun = [(end, other) for end, other in begun if end > start]
        for _, other in begun:
            check(what[i], _interleaved(written[other], written[i]) or _interleaved(written[i], written[other]),
                  f"memory of its own, or a tied weight once; {what[other]} lies there too", "the same memory twice")
        begun.append((stop, i))
    return [(start, stop) for start, stop, _ in spans]


def apart_from(tensors: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The tensors, with copies of those that lie where something is written."""
    out = list(tensors)
    if not spans or not out:
        return out
    starts = np.array([start for start, _ in spans])
    reach = np.maximum.accumulate([0, *(stop for _, stop in spans)])
    begins = np.array([tensor.data_ptr() for tensor in out])
    ends = begins + [tensor.nbytes if tensor.is_contiguous() else _interval(tensor)[1] - _interval(tensor)[0] for tensor in out]
    near = reach[np.searchsorted(starts, ends)] > begins        # of those that begin before it ends, one ends behind its begin
    for i in np.flatnonzero(near & (ends > begins)):
        out[i] = out[i].clone()
    return out


def check_memory_writable(written: Sequence[Tensor], what: Sequence[str]) -> None:
    """Raises AdapterError for CPU memory that is mapped read-only, which to write to would end the process (Linux; elsewhere
    nothing is known)."""
    maps = Path("/proc/self/maps")
    # Storage that torch can resize is its own; what came from elsewhere, such as a mapped file, it cannot.
    tensors = [(t, name) for t, name in zip(written, what, strict=True)
               if t.is_cpu and t.numel() and not t.untyped_storage().resizable()]
    if not tensors or not maps.exists():
        return
    fixed = []
    for line in maps.read_text().splitlines():
        span, rights = line.split(" ", 2)[:2]
        if rights[1] != "w":
            low, high = span.split("-")
            fixed.append((int(low, 16), int(high, 16)))
    starts = [start for start, _ in fixed]
    for tensor, name in tensors:
        start, stop = _interval(tensor)
        before = bisect_left(starts, stop)
        check(name, not before or fixed[before - 1][1] <= start, "memory that can be written",
              "a tensor in a read-only mapping: clone it first, or keep the update beside the base (merge_into: adapter)")


def gradient_like(B: Tensor) -> Tensor:
    """An empty gradient of B, laid out as B is: its ranks outermost where B is a contiguous matrix turned, else contiguous."""
    turned = B.T.is_contiguous() and not B.is_contiguous()
    return B.new_empty(B.shape[::-1]).T if turned else B.new_empty(B.shape)

"""Tensors whose elements lie further apart than 32 bits can count, in every kernel that takes any strides."""
import mmap

import pytest
import torch
from test_triton import DEVICE, pytestmark

from flora.errors import BackendError

STRIDE = 1 << 30
__all__ = ["pytestmark"]


@pytest.fixture
def far(monkeypatch):
    """far(rows): a random fp16 (rows, 3), its columns 2^30 elements apart; what 32 bits would read instead is zero."""
    if DEVICE != "cpu":
        pytest.skip("a GPU would need the 8 GB that memory mapped on demand gives: the far offsets were not tested")
    from triton.runtime import interpreter
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *a: None)        # copies whole storages
    try:
        memory = mmap.mmap(-1, (1 << 33) + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)   # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"8 GB of addresses cannot be had here ({error}): the far offsets were not tested")
    flat, used = torch.frombuffer(memory, dtype=torch.float16), [1 << 31]

    def make(rows):
        t = flat.as_strided((rows, 3), (1, STRIDE), used[0])
        used[0] += rows
        return t.copy_(torch.randn(rows, 3))

    return make


def test_offsets_over_2_to_the_31(far):
    from flora.kernels.triton import tiles
    from flora.kernels.triton.grads import Piece, outer
    from flora.kernels.triton.linear import add_low_rank
    from flora.kernels.triton.shrink import shrink
    x, w, of = far(5), far(4), tiles.Ranks(None, None, 0, 2)
    A, B, h = (torch.randn(shape, dtype=torch.float16) for shape in ((2, 3), (4, 2), (5, 2)))
    assert torch.allclose(shrink(x, A, torch.ones(2), of, 2), x @ A.T, atol=2e-2)
    y = add_low_rank(torch.empty(5, 4, dtype=torch.float16), h, B, of, 2, x=x, w=w)
    assert torch.allclose(y, x @ w.T + h @ B.T, atol=2e-2)
    out = torch.empty(2, 3)
    outer(h, x, [Piece(out, 0, 0, of)], of, 2)
    assert torch.allclose(out, (h.T @ x).float(), atol=2e-2)


def test_factors_that_span_too_much_are_refused(far):
    from flora.kernels import triton
    x, A, B, s = torch.randn(5, 3).half(), torch.randn(2, 3).half(), torch.randn(4, 2).half(), torch.ones(2)
    for own, frozen in ((far(2), []), (A, [far(2), B, s])):
        with pytest.raises(BackendError, match="span fewer than 2³¹ elements"):
            triton.lora_add_(torch.zeros(5, 4).half(), x, own, B, s, frozen, None, None, None, 2, 0.0, None)

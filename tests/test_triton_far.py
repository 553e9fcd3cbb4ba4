"""Tensors whose elements lie further apart than 32 bits can count, in every kernel that takes any strides."""
import mmap

import pytest
import torch
from test_triton import DEVICE, on_a_gpu, pytestmark

from flora.errors import BackendError

STRIDE = 1 << 30
__all__ = ["pytestmark"]


def on_the_card(monkeypatch):
    """8 GB of zeros."""
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("10 GB of the card are not free: the far offsets were not tested")
    return torch.zeros((1 << 32) + 64, dtype=torch.float16, device="cuda")


def mapped(monkeypatch):
    """8 GB of zeros that take memory where they are written only."""
    from triton.runtime import interpreter
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *a: None)        # copies whole storages
    try:
        memory = mmap.mmap(-1, (1 << 33) + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)   # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"8 GB of addresses cannot be had here ({error}): the far offsets were not tested")
    return torch.frombuffer(memory, dtype=torch.float16)


@pytest.fixture
def far(monkeypatch):
    """far(rows): a random fp16 (rows, 3), its columns 2^30 elements apart; what 32 bits would read instead is zero."""
    flat, used = (on_the_card if DEVICE == "cuda" else mapped)(monkeypatch), [1 << 31]

    def make(rows):
        t = flat.as_strided((rows, 3), (1, STRIDE), used[0])
        used[0] += rows
        return t.copy_(torch.randn(rows, 3))

    return make


@on_a_gpu
def test_offsets_over_2_to_the_31(far):
    from flora.kernels.triton import tiles
    from flora.kernels.triton.grads import Piece, outer
    from flora.kernels.triton.linear import add_low_rank
    from flora.kernels.triton.shrink import shrink
    x, w, of = far(5), far(4), tiles.Ranks(None, None, 0, 2)
    A, B, h = (torch.randn(shape, dtype=torch.float16, device=DEVICE) for shape in ((2, 3), (4, 2), (5, 2)))
    near, near_w = x.contiguous(), w.contiguous()
    assert torch.allclose(shrink(x, A, torch.ones(2, device=DEVICE), of, 2), near @ A.T, atol=2e-2)
    y = add_low_rank(x.new_empty(5, 4), h, B, of, 2, x=x, w=w)
    assert torch.allclose(y, near @ near_w.T + h @ B.T, atol=2e-2)
    out = torch.empty(2, 3, device=DEVICE)
    outer(h, x, [Piece(out, 0, 0, of)], of, 2)
    assert torch.allclose(out, (h.T @ near).float(), atol=2e-2)


def test_factors_that_span_too_much_are_refused(far):
    from flora.kernels import triton
    x, A, B = (torch.randn(shape, device=DEVICE).half() for shape in ((5, 3), (2, 3), (4, 2)))
    s = torch.ones(2, device=DEVICE)
    for own, frozen in ((far(2), []), (A, [far(2), B, s])):
        with pytest.raises(BackendError, match="span fewer than 2³¹ elements"):
            triton.lora_add_(x.new_zeros(5, 4), x, own, B, s, frozen, None, None, None, 2, 0.0, None)

"""What an operator takes: checks whose errors say what was expected and what came. Messages are composed only for errors."""
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flora.errors import AdapterError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check(what: str, good: bool, expected: str, got: object) -> None:
    """Raises AdapterError, naming both sides, unless good."""
    if not good:
        raise AdapterError(f"{what}: expected {expected}; got {got}")


def check_dtype(what: str, tensor: Tensor) -> None:
    """One of the four floating-point dtypes."""
    check(what, tensor.dtype in FLOATS, "float32, float64, float16 or bfloat16", tensor.dtype)


def check_weight(weight: Tensor) -> None:
    """A floating-point matrix."""
    check_dtype("weight", weight)
    check("weight", weight.dim() == 2, "a matrix (out, in)", tuple(weight.shape))


def check_ranks(what: str, ranks: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int], device: torch.device) -> None:
    """A (R, in), B (out, R), scale (R,) for a weight of this shape (out, in), floating point, on this device."""
    (A, B, scale), (N, K) = ranks, shape
    R = len(A) if A.dim() else 0
    if (A.shape == (R, K) and B.shape == (N, R) and scale.shape == (R,) and A.device == B.device == scale.device == device
            and A.dtype in FLOATS and B.dtype in FLOATS and scale.dtype in FLOATS):
        return
    check(f"{what} A", A.dim() == 2 and A.shape[1] == K, f"(rank, {K}), the weight being ({N}, {K})", tuple(A.shape))
    R = A.shape[0]
    check(f"{what} B", B.dim() == 2 and tuple(B.shape) == (N, R), f"({N}, {R})", tuple(B.shape))
    check(f"{what} scale", tuple(scale.shape) == (R,), f"a vector ({R},), one number a rank", tuple(scale.shape))
    for name, tensor in (("A", A), ("B", B), ("scale", scale)):
        check_dtype(f"{what} {name}", tensor)
        check(f"{what} {name}", tensor.device == device, f"a tensor on {device}", tensor.device)


def check_reverse(*tensors: Tensor) -> None:
    """No forward-mode derivative is asked for: the operators would drop it without a word."""
    if forward_ad._current_level >= 0:
        asked = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
        check("derivative", not asked, "one in reverse mode (the operators are differentiable once, in reverse mode)",
              "a tangent: forward mode (torch.func.jvp, torch.autograd.forward_ad)")


def check_no_leaf(what: str, tensor: Tensor) -> None:
    """Autograd lets it be written in place; it would say so itself, but only after the write."""
    if tensor.requires_grad or tensor._base is not None:
        owner = tensor if tensor._base is None else tensor._base
        refused = owner.is_leaf and owner.requires_grad and torch.is_grad_enabled()
        check(what, not refused, "a tensor that autograd lets be written in place (clone it, or call under no_grad)",
              "a leaf that requires grad, or a view of one")


def check_writable(what: str, tensor: Tensor) -> None:
    """No two elements share memory."""
    owned = all(size < 2 or stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    check(what, owned, "a tensor that owns each of its elements (clone it first)", f"strides {tensor.stride()}, expanded")

"""A GPU that is not there: tensors that say `cuda:0` and keep their numbers on the CPU, so that what goes wrong between two devices
goes wrong here too.

Operations that mix the two devices raise, as on a GPU; whatever would make the host wait for the device is written down. The
numbers are the CPU's, so a whole round can be compared with one on the CPU. To torch's own C++ the tensors lie on the CPU: what a
kernel does on a real card is not seen here.
"""
import contextlib
import itertools
import traceback
from collections import Counter
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda:0")
BELOW = torch.device("meta")                                    # what torch's C++ is told: it asks "meta" for no driver
# What reads a number, or has to know some to say how large its output is.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
MOVES = {"copy_", "_to_copy"}
HOST_OPERANDS = {"flora", "torch_attn"}                         # operators with lists of offsets on the host, by contract


class OnGPU(torch.Tensor):
    """A tensor that says it lies on the GPU. held: its numbers."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=BELOW, requires_grad=False)

    def __init__(self, held):
        self.held = held

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    data = property(lambda self: self.held)                     # of the plain type, which a layer asks for

    def __repr__(self):
        return f"OnGPU({self.held})"

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def to(self, *args, copy=False, **kwargs):
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copy, **({} if layout is None else {"memory_format": layout}))
        return super().to(*args, copy=copy, **kwargs)

    def tolist(self):
        return self.to("cpu").tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of the GPU outlived it")


class FakeGPU(TorchDispatchMode):
    """While it is on there is a GPU. waits: how often the host waited for it, by reason, and where in `places`; calls: operators
    that the GPU was given."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE             # so that torch looks for no driver
    now: "FakeGPU"

    def __init__(self):
        super().__init__()
        self.waits, self.calls, self.places, self._pinned = Counter(), Counter(), [], {}

    def note(self, what, waits=True):
        if waits:
            self.waits[what] += 1
            frames = [f for f in traceback.extract_stack() if "/flora/" in f.filename or "transformers" in f.filename]
            self.places.append((what, [f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.line}" for f in frames[-4:]]))

    def pin(self, t):
        """A copy of a CPU tensor in memory that a GPU could read by itself."""
        held = t.clone()
        self._pinned[held.untyped_storage().data_ptr()] = held
        return held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, OnGPU)]
        here = [t for t in tensors if not isinstance(t, OnGPU) and t.dim()]
        target = kwargs.get("device")
        goes = bool(there) if target is None else torch.device(target).type in ("cuda", "meta")
        if there and here and name not in MOVES and func.namespace not in HOST_OPERANDS:
            raise RuntimeError(f"Expected all tensors to be on the same device; {func} got "
                               f"{[(str(t.device), tuple(t.shape)) for t in tensors]}")
        if goes:
            self.calls[name] += 1
        self._watch(name, args, kwargs, bool(there), goes)
        if target is not None and goes:
            kwargs["device"] = torch.device("cpu")
        if name == "_fused_sdp_choice":
            return 0                                            # in plain operators, which are the same everywhere
        args_, kwargs_ = (tree_map_only(OnGPU, lambda t: t.held, some) for some in (args, kwargs))
        try:
            out = VARLEN[name](*args_) if name in VARLEN else func(*args_, **kwargs_)
        except NotImplementedError as error:
            raise NotImplementedError(str(error).split("\n")[0]) from None
        if not goes:
            return args[0] if name == "copy_" else out
        given = {id(t.held): t for t in there}
        return tree_map_only(torch.Tensor, lambda t: given[id(t)] if id(t) in given else OnGPU(t), out)

    def _watch(self, name, args, kwargs, there, goes):
        """Writes down what waits."""
        if there and name in WAITS:
            self.note(name)
        if there and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.note("a mask as index", any(i is not None and i.dtype == torch.bool for i in args[1]))
        source, to = (args[1], args[0]) if name == "copy_" else (args[0], None) if name == "_to_copy" else (None, None)
        if source is None:
            return
        free = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        up = not isinstance(source, OnGPU) and (isinstance(to, OnGPU) if name == "copy_" else goes)
        down = isinstance(source, OnGPU) and (not isinstance(to, OnGPU) if name == "copy_" else not goes)
        if up:
            self.calls["to the GPU"] += 1
            self.note("a copy from the host", not (free and source.untyped_storage().data_ptr() in self._pinned))
        if down:
            self.note("a copy to the host", not free)

    def __enter__(self):
        FakeGPU.now, self._before = self, torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor(..., device=...) is then a copy that is seen
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*error)


def _sequences(q, k, v, begins, longest, scale, window):
    """Of each sequence of a line: its places; q, k and v in fp32 with as many heads, (heads, tokens, size); the softmax."""
    begins = begins.tolist()
    assert longest == max(b - a for a, b in itertools.pairwise(begins)) and begins[-1] == len(q) and window[1] == 0
    for first, last in itertools.pairwise(begins):
        own = [t[first:last].float().repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (q, k, v)]
        far = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (far >= 0) & (far <= window[0] if window[0] >= 0 else True)
        scores = (own[0] @ own[1].mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, -torch.inf)
        yield slice(first, last), *own, scores.softmax(-1)


def _varlen(q, k, v, begins, _, longest, __, causal, scale, window, *rest):
    """torch's attention over a line, in plain operators: (out, log-sum-exp, random state), the last two unread."""
    parts = [(p @ own_v).transpose(0, 1) for _, _, _, own_v, p in _sequences(q, k, v, begins, longest, scale, window)]
    return torch.cat(parts).to(q.dtype), torch.zeros(1), torch.zeros(1)


def _varlen_backward(dy, q, k, v, _, __, begins, ___, longest, ____, causal, _____, scale, window):
    dq, dk, dv = (torch.zeros(t.shape) for t in (q, k, v))
    for here, own_q, own_k, own_v, p in _sequences(q, k, v, begins, longest, scale, window):
        d = dy[here].float().transpose(0, 1)
        dp = d @ own_v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * (scale or q.shape[-1] ** -0.5)
        for out, t in ((dq, ds @ own_k), (dk, ds.mT @ own_q), (dv, p.mT @ d)):
            out[here] = t.transpose(0, 1).unflatten(1, (out.shape[1], -1)).sum(2)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


VARLEN = {"torch_attn::_varlen_attn": _varlen, "torch_attn::_varlen_attn_backward": _varlen_backward}


class _Event:
    """Of a stream on which everything is done at once."""

    def __init__(self, **_):
        pass

    def record(self, *_):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def groups_of(lists, with_indices=False):
    """torch's grouping of an optimiser's tensors, by the device that they say they are on."""
    found = {}
    for i, first in enumerate(lists[0]):
        found.setdefault((first.device, first.dtype), []).append(i)
    return {key: ([[some[i] for i in places] if some else [] for some in lists], places) for key, places in found.items()}


@contextlib.contextmanager
def fake_gpu(monkeypatch, free=60 << 30):
    """A machine with one GPU with so many bytes free; gives the FakeGPU."""
    gpu, cuda = FakeGPU(), torch.cuda
    nothing = contextlib.nullcontext
    for name, value in {
            "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1, "synchronize": lambda *_: None,
            "empty_cache": lambda: None, "mem_get_info": lambda *_: (free, 80 << 30), "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: 0, "get_rng_state": lambda *_: torch.get_rng_state(), "device": lambda *_: nothing(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state), "Event": _Event, "set_device": lambda *_: None,
            "current_stream": lambda *_: SimpleNamespace(record_event=lambda event=None: event or _Event()),
            "manual_seed_all": lambda *_: None, "get_device_name": lambda *_: "no GPU at all",
            "is_current_stream_capturing": lambda: False, "get_device_capability": lambda *_: (9, 0)}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: gpu.pin(t))
    monkeypatch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(groups_of))
    with gpu:
        yield gpu


def to_gpu(model):
    """The model's parameters and buffers put there."""
    shared = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = shared.setdefault(id(p), nn.Parameter(p.detach().to(GPU), p.requires_grad))
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = b.to(GPU)
    return model

"""LoRA linears as one would write them around cuBLAS: a peer's order of calls, and ways that flora does not have, to be measured.

The ideas have one skinny product for the linears of one x; they differ in how y = x Wᵀ + h Bᵀ and dx = dy W + dh A come about.
What each is expected to give on a GPU stands in dev/LOG.md.

    more K              one product of [x | h] and [W | B]: y is written once, x is copied once for all linears that read it; W lies
                        in a wider buffer. Taken where x is smaller than what an expand writes (backward: dy than dx)
    more K, one dy pass the same, with dh and dB from one pass over dy, by flora's kernel
    rows in chunks      product and expand, a few rows at a time, so that the expand finds y in the L2 cache
    side stream         forward: the skinny product beside the base product, then the expand
"""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.shapes import READS

HOW = ("more K", "more K, one dy pass", "rows in chunks", "side stream")
CACHED = 16 << 20                                                       # bytes of y that should still be in the L2 cache


class Linears:
    """The linears of one input: their weights, how they are computed, and a buffer for each weight and its ranks."""

    def __init__(self, weights: list[Tensor], rank: int, how: str):
        self.how, self.rank, self.wide = how, rank, rank * len(weights)
        self.side = torch.cuda.Stream() if how == "side stream" and weights[0].is_cuda else None
        (self.N, self.K), outs = weights[0].shape, sum(len(w) for w in weights)
        wider = how.startswith("more K")
        self.forward_wide = wider and outs > self.K
        self.backward_wide = wider and len(weights) == 1 and self.N < self.K
        self.buffers = [self._buffer(w) for w in weights]
        self.weights = [b[:len(w), :w.shape[1]] for b, w in zip(self.buffers, weights, strict=True)]

    def _buffer(self, w: Tensor) -> Tensor:
        """[W | 0; 0 | 0] with room for B beside W and for A below; W itself where no product is to be wider."""
        if not (self.forward_wide or self.backward_wide):
            return w
        buffer = w.new_zeros(len(w) + self.wide, self.K + self.wide)
        buffer[:len(w), :self.K] = w
        return buffer

    def through(self, dy: Tensor, h: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """dh and dB of one linear."""
        if self.how != "more K, one dy pass":
            return dy @ (B * scale), dy.T @ h
        from flora.kernels.triton.grads import dy_pass
        from flora.kernels.triton.tiles import Ranks
        dh, dB = dy.new_empty(len(dy), self.rank), torch.empty_like(B)
        dy_pass(dy, B, torch.full((self.rank,), scale, device=dy.device), h, dh, dB, Ranks(None, None, 0, self.rank), self.rank)
        return dh, dB

    def pieces(self, y: Tensor) -> Iterator[slice]:
        """Rows of y that are computed together."""
        step = max(256, CACHED // (y.element_size() * y.shape[1])) if self.how == "rows in chunks" else max(1, len(y))
        return (slice(first, first + step) for first in range(0, len(y), step))

    def expanded(self, x: Tensor, w: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """x wᵀ + h bᵀ as a product and an expand."""
        y = x.new_empty(len(x), len(w))
        for rows in self.pieces(y):
            torch.mm(x[rows], w.T, out=y[rows])
            y[rows].addmm_(h[rows], b.T)
        return y

    def slot(self, i: int) -> slice:
        return slice(self.K + i * self.rank, self.K + (i + 1) * self.rank)


class Idea(torch.autograd.Function):
    """All linears of one x."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float, of: Linears, *factors: Tensor) -> tuple[Tensor, ...]:
        As, Bs = factors[::2], factors[1::2]
        A = torch.cat(As) * scale
        if of.forward_wide:
            wide = x.new_empty(len(x), of.K + of.wide)
            wide[:, :of.K] = x
            h = torch.mm(x, A.T, out=wide[:, of.K:])
            ys = []
            for i, (buffer, B) in enumerate(zip(of.buffers, Bs, strict=True)):
                buffer[:len(B), of.slot(i)] = B
                ys.append(wide @ buffer[:len(B)].T)
        elif of.side is not None:
            main = torch.cuda.current_stream()
            of.side.wait_stream(main)
            with torch.cuda.stream(of.side):
                h = x @ A.T
            ys = [x @ w.T for w in of.weights]
            main.wait_stream(of.side)
            h.record_stream(main)
            for y, part, B in zip(ys, h.split(of.rank, 1), Bs, strict=True):
                y.addmm_(part, B.T)
        else:
            h = x @ A.T
            ys = [of.expanded(x, w, part, B) for w, part, B in zip(of.weights, h.split(of.rank, 1), Bs, strict=True)]
        ctx.scale, ctx.of = scale, of
        ctx.save_for_backward(x, h, *factors)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *factors = ctx.saved_tensors
        of, As, Bs = ctx.of, factors[::2], factors[1::2]
        found = [of.through(dy, part, B, ctx.scale) for dy, part, B in zip(dys, h.split(of.rank, 1), Bs, strict=True)]
        dh, dB = torch.cat([one[0] for one in found], 1), [one[1] for one in found]
        if of.backward_wide:
            of.buffers[0][of.N:, :of.K] = As[0]
            dx = torch.cat([dys[0], dh], 1) @ of.buffers[0][:, :of.K]
        else:
            dx, A = torch.empty_like(x), torch.cat(As)
            for rows in of.pieces(x):
                torch.mm(dys[0][rows], of.weights[0], out=dx[rows])
                for dy, w in zip(dys[1:], of.weights[1:], strict=True):
                    dx[rows].addmm_(dy[rows], w)
                dx[rows].addmm_(dh[rows], A)
        dAs = (dh.T @ x).split(of.rank)
        return dx, None, None, *(grad for pair in zip(dAs, dB, strict=True) for grad in pair)


class Unsloth(torch.autograd.Function):
    """All linears of one x, in the order of calls of Unsloth's LoRA_QKV (unslothai/unsloth, unsloth/kernels/fast_lora.py): addmm_
    on top of each product; x Aᵀ once more in the backward pass, dy B twice; dx of all linears summed in place (there: over x)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float, weights: list[Tensor], *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.scale, ctx.weights = scale, weights
        ctx.save_for_backward(x, *factors)
        return tuple((x @ w.T).addmm_(x @ A.T, B.T, alpha=scale)
                     for w, A, B in zip(weights, factors[::2], factors[1::2], strict=True))

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        dx, grads = None, []
        for dy, w, A, B in zip(dys, ctx.weights, factors[::2], factors[1::2], strict=True):
            grads += [torch.empty_like(A).addmm_((dy @ B).T, x, beta=0, alpha=ctx.scale),
                      torch.empty_like(B).addmm_(dy.T, x @ A.T, beta=0, alpha=ctx.scale)]
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(dy @ B, A, alpha=ctx.scale)
        return dx, None, None, *grads


class Grouped(nn.Module):
    """A decoder layer's linears by one of these functions, those of one input in one call. prepare: makes its third argument."""

    def __init__(self, base: nn.Module, rank: int, dtype: torch.dtype, function: type[torch.autograd.Function],
                 prepare: Callable[[list[Tensor]], object]):
        super().__init__()
        named, self.function = list(base.named_children()), function
        of = {read: [k for k, (name, _) in enumerate(named) if READS[name] == read] for read in sorted(set(READS.values()))}
        self.groups = [(read, prepare([named[k][1].weight.detach() for k in own]), own) for read, own in of.items()]
        new = {"dtype": dtype, "device": named[0][1].weight.device}
        self.As = nn.ParameterList(torch.randn(rank, layer.in_features, **new) * 0.02 for _, layer in named)
        self.Bs = nn.ParameterList(torch.randn(layer.out_features, rank, **new) * 0.02 for _, layer in named)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [y for read, prepared, own in self.groups for y in
                self.function.apply(inputs[read], 2.0, prepared, *(t for k in own for t in (self.As[k], self.Bs[k])))]


def unsloth(base: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module:
    return Grouped(base, rank, dtype, Unsloth, list)


def ideas(new: Callable[[], nn.Module], rank: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Every idea by its name in the tables, on layers of its own."""
    def one(how: str) -> nn.Module:
        return Grouped(new(), rank, dtype, Idea, lambda weights: Linears(weights, rank, how))

    return {f"idea: {how}": one(how) for how in HOW}

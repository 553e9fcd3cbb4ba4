"""The merge as users call it, on a card: its roundings, what it refuses, streams; and that what the sanitizers run is right."""
import itertools
import subprocess
import sys

import pytest
import torch
from oracles import adapter
from tiny import ROOT

from flora import kernels, ops
from flora.errors import AdapterError


def test_what_the_sanitizers_run_is_right():
    """benchmarks.sanitized, with the backends of this machine."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.sanitized"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count(": right") >= 36, done.stdout + done.stderr


@pytest.mark.gpu
def test_public_operators_on_a_card():
    """flora.ops.merge_many_, with residuals and by chance, bumps versions and gives the CPU's bits where sums are exact."""
    for kept, rounding in itertools.product((False, True), ("nearest", "stochastic")):
        weights = [torch.randint(-256, 257, shape).bfloat16() for shape in ((70, 130), (64, 256))]
        factors = [[[torch.randint(-8, 9, shape).float() for shape in shapes] for shapes in layers] for layers in
                   ((((3, 130), (5, 130)), ((2, 256),)), (((70, 3), (70, 5)), ((64, 2),)), (((3,), (5,)), ((2,),)))]
        results = []
        for device in ("cpu", "cuda"):
            got = [w.to(device, copy=True) for w in weights]
            left = [torch.zeros_like(w) for w in got] if kept else None
            given = [[[t.to(device) for t in layer] for layer in group] for group in factors]
            ops.merge_many_(got, *given, residuals=left, rounding=rounding, seed=5)
            assert all(w._version >= 1 for w in got)
            results.append([t.cpu() for t in (*got, *(left or ()))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_not_finite_on_a_card_is_refused_before_anything_is_written():
    """That a NaN in an adapter on a card leaves the weight as it was."""
    weight, a = torch.ones(40, 50, device="cuda"), adapter(40, 50, 4).to("cuda")
    a.B[7, 3] = float("nan")
    with pytest.raises(AdapterError, match="layer 0, adapter 0, B"):
        ops.merge_(weight, a.A, a.B, a.scale)
    assert bool((weight == 1).all())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_the_current_stream_and_captures():
    """That the CUDA merge_ waits for what its stream was given before, and refuses a stream that is being captured."""
    if kernels.resolve("merge_", "cuda").__module__ != "flora.kernels.native":
        pytest.skip("the native extension was built without CUDA: streams and captures of its merge_ were not tested")
    a = adapter(2048, 2048, 16).to("cuda")

    def merge_(weight):
        torch.ops.flora_native.merge_.default([weight], [], [a.A], [a.B], [a.scale], [1], [])

    start, big = torch.randn(2048, 2048, device="cuda"), torch.randn(8192, 8192, device="cuda")
    expected, late = start.clone(), torch.zeros_like(start)
    merge_(expected)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(20):
            big @ big                                             # some milliseconds, in which another stream would have merged
        late.copy_(start)
        merge_(late)
    side.synchronize()
    assert torch.equal(late, expected)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="a stream that is not being captured"), torch.cuda.graph(graph):
        merge_(late)
    torch.cuda.synchronize()
    assert torch.equal(late, expected)

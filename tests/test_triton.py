"""The Triton kernels one by one with every shipped configuration, the choice of form and blocks, and the table of the clients."""
import json

import oracles
import pytest
import torch
from tiny import ROOT

from flora import kernels
from flora.kernels import reference

module, why = kernels._load("triton")
pytestmark = [pytest.mark.skipif(module is None, reason=f"triton cannot be imported ({why}): its kernels were not tested"),
              pytest.mark.skipif(not torch.cuda.is_available() and not getattr(module, "WHEN_FORCED", {}),
                                 reason="no GPU and TRITON_INTERPRET is not 1: the Triton kernels were not tested")]
if module is not None:
    from flora.kernels.triton import configs, rule, tiles
    from flora.kernels.triton.grads import Piece, dy_pass, outer
    from flora.kernels.triton.linear import add_low_rank
    from flora.kernels.triton.shrink import shrink

    SHIPPED = [(kernel, config) for kernel, shipped in configs.SHIPPED.items() for config in shipped]
else:
    SHIPPED = []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, RANKS = (70, 0, 3, 90), (8, 2, 20, 3)


def offsets(numbers):
    return torch.tensor([sum(numbers[:k]) for k in range(len(numbers) + 1)])


def tensors(dtype, *shapes):
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def name_of(v):
    return v if isinstance(v, str) else f"{v.block_m}x{v.block_n}x{v.block_k}x{v.block_r}"


@pytest.mark.gpu
@pytest.mark.parametrize("segmented", [False, True], ids=["one adapter", "clients"])
@pytest.mark.parametrize(("kernel", "config"), SHIPPED, ids=name_of)
def test_every_shipped_configuration_on_a_gpu(kernel, config, segmented):
    """The blocks of every table, compiled, in bfloat16 and in fp32 where they are for it."""
    if config.arch > configs.arch_of(torch.device("cuda")):
        pytest.skip(f"this card is older than sm_{config.arch}: these blocks were not tested")
    one_call(kernel, config, segmented, torch.bfloat16)
    if config is configs.SHIPPED[kernel][0]:
        one_call(kernel, config, segmented, torch.float32)


@pytest.mark.parametrize("segmented", [False, True], ids=["one adapter", "clients"])
@pytest.mark.parametrize(("kernel", "config"), SHIPPED, ids=name_of)
def test_every_shipped_configuration_is_right(kernel, config, segmented):
    """In fp16 where they are for it."""
    if config.arch > configs.arch_of(torch.device(DEVICE)):
        pytest.skip(f"this card is older than sm_{config.arch}: these blocks were not tested")
    one_call(kernel, config, segmented, torch.float32 if config.block_m < 64 else torch.float16)


def one_call(kernel, config, segmented, dtype):
    """One call with these very blocks against fp64."""
    M, N, K = sum(ROWS), 150, 140
    ranks = RANKS if segmented else (min(24, config.block_r) if kernel == "dy_pass" else 24,)
    if kernel == "dy_pass" and segmented:
        ranks = tuple(min(r, config.block_r) for r in ranks)
    rows = ROWS if segmented else (M,)
    of = tiles.training_ranks(offsets(rows) if segmented else None, offsets(ranks) if segmented else None, sum(ranks))
    width, R = max(ranks), sum(ranks)
    x, w, A, B, dy, h = tensors(dtype, (M, K), (N, K), (R, K), (N, R), (M, N), (M, width))
    scale = torch.rand(R, device=DEVICE) + 0.5
    starts, first = offsets(rows).tolist(), offsets(ranks).tolist()
    spans = [(slice(starts[k], starts[k + 1]), slice(first[k], first[k + 1]), r) for k, r in enumerate(ranks)]
    double = [t.double() for t in (x, w, A, B, dy, h)]

    def close(actual, exact):
        assert oracles.relative(actual, exact) < 4 * torch.finfo(actual.dtype).eps * 10

    if kernel == "shrink":
        out = shrink(x, A, scale, of, width, config=config)
        for own, some, r in spans:
            close(out[own, :r], (double[0][own] @ double[2][some].T) * scale[some]) if own.stop > own.start else None
            assert not out[own, r:].any()
    elif kernel in ("linear", "linear_parts", "expand", "expand_parts"):
        base = kernel.startswith("linear")
        y = torch.full((M, N), 7.0, device=DEVICE, dtype=dtype)
        add_low_rank(y, h, B, of, width, x=x if base else None, w=w if base else None, config=config)
        for own, some, r in spans:
            exact = double[5][own, :r] @ double[3][:, some].T + (double[0][own] @ double[1].T if base else 7.0)
            close(y[own], exact) if own.stop > own.start else None
    elif kernel == "outer":
        out = torch.full((R, K), float("nan"), device=DEVICE)
        outer(h, x, [Piece(out, 0, 0, of)], of, width, config=config)
        for own, some, r in spans:
            exact = double[5][own, :r].T @ double[0][own]
            close(out[some].to(dtype), exact) if own.stop > own.start else None
            assert own.stop > own.start or not out[some].any()
    else:
        dh, dB = torch.full((M, width), float("nan"), device=DEVICE, dtype=dtype), torch.full((N, R), float("nan"), device=DEVICE)
        dy_pass(dy, B, scale, h, dh, dB, of, width, config=config)
        for own, some, r in spans:
            if own.stop > own.start:
                close(dh[own, :r], (double[4][own] @ double[3][:, some]) * scale[some])
                close(dB[:, some].to(dtype), double[4][own].T @ double[5][own, :r])
            assert not dh[own, r:].any() and not dB[:, some].isnan().any()


def test_the_mask_is_that_of_the_reference_bit_for_bit():
    keys = torch.randint(-2**63, 2**63 - 1, (70,), device=DEVICE)
    eye, ones = torch.eye(90, device=DEVICE), torch.ones(70, 90, device=DEVICE)
    of = tiles.Ranks(None, None, 0, 90)
    for dropout in (0.1, 0.5, 0.97):
        mask = reference.dropout_mask(keys, 90, dropout, torch.float32)
        h = shrink(ones, eye, torch.ones(90, device=DEVICE), of, 90, keys=keys, dropout=dropout)
        y = add_low_rank(torch.zeros(70, 90, device=DEVICE), ones, eye, of, 90, keys=keys, dropout=dropout)
        assert torch.equal(h != 0, mask != 0) and torch.equal(y != 0, mask != 0)
        assert torch.allclose(h, mask, rtol=1e-6) and torch.allclose(y, mask, rtol=1e-6)


def test_tables_of_clients():
    rows, ranks, device = offsets((5, 0, 70, 1)), offsets((2, 3, 1, 4)), torch.device("cpu")
    of = tiles.training_ranks(rows, ranks, 10)
    table, count, total = tiles.row_tiles(of, 32, device)
    assert table.tolist() == [[0, 5, 0, 2, 0], [5, 37, 5, 1, 2], [37, 69, 5, 1, 3], [69, 75, 5, 1, 4], [75, 76, 6, 4, 5]]
    assert (count, total) == (5, 9)
    assert tiles.chunk_bounds(of, 32, device).tolist() == [[0, 1, 0, 2], [2, 0, 2, 3], [2, 3, 5, 1], [5, 1, 6, 4]]
    assert tiles.clients(of, device).tolist() == [[0, 5, 0, 2], [5, 5, 2, 3], [5, 75, 5, 1], [75, 76, 6, 4]]
    for tile, (low, high) in enumerate(tiles.spans(of, 32, device).tolist()):
        inside = [k for k in range(4) if rows[k] < rows[k + 1] and rows[k] < (tile + 1) * 32 and rows[k + 1] > tile * 32]
        assert [k for k in range(low, high) if rows[k] < rows[k + 1]] == inside
    assert tiles.row_tiles(of, 32, device) is tiles.row_tiles(tiles.training_ranks(rows, ranks, 10), 32, device)
    assert tiles.row_tiles(tiles.training_ranks(rows.clone(), ranks, 10), 32, device) is not tiles.row_tiles(of, 32, device)


def test_what_was_compiled_takes_no_more_shared_memory_than_its_configuration_says():
    """The record of make aot, which compiled every shipped configuration."""
    from flora.kernels.triton import aot
    record = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())
    cases = list(aot.cases())
    assert len(record) == len(cases) and {86, 89} < {case.arch for case in cases}
    for case, result in zip(cases, record, strict=True):
        assert result["arch"] == f"sm_{case.arch}" and not aot.faults(case, result)


def test_equal_ranges_of_frozen_ranks_are_one_table():
    rows, ranges, device = offsets((5, 70)), torch.tensor([(0, 2), (1, 3)]), torch.device("cpu")
    tables = [tiles.clients(tiles.frozen_ranks(rows, ranges.clone(), 3), device) for _ in range(3)]
    assert all(table is tables[0] for table in tables) and len(tiles._KEPT[rows]) == 2
    assert tiles.clients(tiles.frozen_ranks(rows, ranges - ranges, 3), device).tolist() == [[0, 5, 0, 0], [5, 75, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_shape_gets_a_shipped_configuration_that_its_card_has(dtype, monkeypatch):
    device = torch.device("cpu")
    for arch, shared in ((80, 166_912), (86, 101_376), (89, 101_376), (90, 232_448), (100, 232_448), (120, 101_376)):
        monkeypatch.setattr(configs, "arch_of", lambda device, arch=arch: arch)
        monkeypatch.setattr(configs, "shared_of", lambda device, shared=shared: shared)
        for M in (1, 63, 64, 1000, 2048, 32768):
            for ranks in (1, 16, 17, 64, 65, 300, 1024):
                for N in (64, 2048, 28672):
                    for parts in (False, True):
                        chosen = configs.linear_config(M, N, ranks, dtype, parts, device)
                        assert chosen in configs.SHIPPED["linear_parts" if parts else "linear"] and chosen.arch <= arch
                        assert chosen.shared <= shared
                        chosen = configs.expand_config(M, ranks, dtype, parts)
                        assert chosen in configs.SHIPPED["expand_parts" if parts else "expand"]
                assert configs.outer_config(M, ranks, dtype) in configs.SHIPPED["outer"]
                chosen = configs.shrink_config(M, 4096, ranks, dtype, device)
                assert any(configs.replace(chosen, splits=c.splits) == c for c in configs.SHIPPED["shrink"])
                assert chosen.shared <= shared and (ranks <= 64 or dtype == torch.float32 or M < 64 or chosen.block_r == 128)
                if ranks <= configs.ONE_PASS_RANKS:
                    chosen = configs.dy_pass_config(M, ranks, dtype)
                    assert chosen in configs.SHIPPED["dy_pass"] and chosen.block_r >= ranks


def test_a_measured_table_decides_and_its_absence_means_the_addmm_form(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    shape = (8192, 4096, 4096, 16, False)
    rule.table.cache_clear(), rule._form.cache_clear()
    assert rule._form("forward", *shape, False, torch.bfloat16, "A Card") == rule.FLOOR
    assert rule._form("forward", *shape[:-1], True, False, torch.bfloat16, "A Card") == rule.Form("triton", "torch")
    (tmp_path / "tuned").mkdir()
    key = rule.shape_key("forward", *shape, torch.bfloat16)
    assert key == "forward 8192x4096x4096 r16 bfloat16"
    (tmp_path / "tuned" / "a-card.json").write_text(json.dumps({"forms": {key: ["triton", "fused"]}}))
    rule.table.cache_clear(), rule._form.cache_clear()
    for M in (6000, 8192, 11000):
        assert rule._form("forward", M, *shape[1:], False, torch.bfloat16, "A Card") == rule.Form("triton", "fused")
    assert rule._form("backward", *shape, False, torch.bfloat16, "A Card") == rule.FLOOR
    rule.table.cache_clear(), rule._form.cache_clear()


def test_sizes_round_to_the_nearest_power_of_two():
    rounded = [int(rule.shape_key("forward", n, 1, 1, 1, False, torch.float32).split()[1].split("x")[0]) for n in
               (0, 1, 2, 3, 5, 6, 11, 12, 8192, 11008, 14336, 28672)]
    assert rounded == [1, 1, 2, 4, 4, 8, 8, 16, 8192, 8192, 16384, 32768]


@pytest.mark.parametrize("segmented", [False, True])
def test_tuning_measures_every_form_and_writes_what_the_rule_reads(tmp_path, monkeypatch, segmented):
    """Every form is asked for; the table holds the fastest, and what is not 3 % faster than the floor stays the floor."""
    from flora.kernels.triton import tune
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    shape = tune.Shape(40, 33, 35, 20, segmented)
    asked = set()
    for op in ("lora_linear", "lora_linear_backward"):
        monkeypatch.setattr(tune.backend, op, lambda *a: asked.add(rule._forced))
    ticks = {form: 1.0 - 0.02 * k for k, form in enumerate(rule.FORMS)}
    clock = iter(())

    def now():
        nonlocal clock
        value = next(clock, None)
        if value is None:
            clock = iter((ticks[rule._forced],))
            return 0.0
        return value

    monkeypatch.setattr(tune.time, "perf_counter", now)
    results = list(tune.tune([shape], torch.float32, DEVICE))
    forms = [form for form in rule.FORMS if not segmented or form.skinny == "triton"]
    assert asked == set(forms) and [set(r.seconds) for r in results] == [set(forms)] * 2
    assert {r.form for r in results} == {rule.FORMS[3]}
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    assert set(rule.table(name)) == {rule.shape_key(op, *shape, torch.float32) for op in ("forward", "backward")}
    ticks = dict.fromkeys(rule.FORMS, 1.0) | {rule.FORMS[3]: 0.98}
    assert {r.form for r in tune.tune([shape], torch.float32, DEVICE)} == {forms[0]}
    rule.table.cache_clear(), rule._form.cache_clear()


def test_a_call_asks_for_what_its_measurement_was_written_under(monkeypatch):
    """Ten clients as one: by the ranks of the largest."""
    from flora.kernels.triton import tune
    asked = []
    monkeypatch.setattr(rule, "_form", lambda *a: asked.append(rule.shape_key(*a[:6], a[7])) or rule.Form("triton", "torch"))
    for segmented in (False, True):
        shape = tune.Shape(40, 33, 35, 20, segmented)
        for op, call in tune._passes(shape, torch.float32, DEVICE).items():
            call()
            assert asked.pop() == rule.shape_key(op, *shape, torch.float32) and not asked


def test_tuning_runs_the_operators_themselves():
    from flora.kernels.triton import tune
    for segmented in (False, True):
        for result in tune.measure(tune.Shape(12, 9, 10, 11, segmented), torch.float32, DEVICE, repeats=1, warmup=0):
            assert all(seconds > 0 for seconds in result.seconds.values())

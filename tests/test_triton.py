"""The Triton kernels one by one with every shipped configuration, the choice of form and blocks, and the table of the clients."""
import gc
import json
from dataclasses import astuple

import oracles
import pytest
import torch
from tiny import ROOT

from flora import kernels
from flora.kernels import reference

module, why = kernels._load("triton")
pytestmark = [pytest.mark.skipif(module is None, reason=f"triton cannot be imported ({why}): its kernels were not tested"),
              pytest.mark.skipif(not torch.cuda.is_available() and not getattr(module, "WHEN_FORCED", {}),
                                 reason="no GPU and TRITON_INTERPRET is not 1: the Triton kernels were not tested"),
              *[pytest.mark.usefixtures("compiled")] * torch.cuda.is_available()]
if module is not None:
    from flora.kernels.triton import configs, rule, tiles
    from flora.kernels.triton.grads import Piece, dy_pass, outer
    from flora.kernels.triton.linear import add_low_rank
    from flora.kernels.triton.shrink import shrink

    SHIPPED = [(kernel, config) for lists in (configs.SHIPPED, configs.TRIED) for kernel, some in lists.items() for config in some]
else:
    SHIPPED = []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.gpu if DEVICE == "cuda" else lambda test: test         # where there is one, among what -m gpu asks for
ROWS, RANKS = (70, 0, 3, 90), (8, 2, 20, 3)


def offsets(numbers):
    return torch.tensor([sum(numbers[:k]) for k in range(len(numbers) + 1)])


def tensors(dtype, *shapes):
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def name_of(v):
    return v if isinstance(v, str) else f"{v.block_m}x{v.block_n}x{v.block_k}x{v.block_r}-{v.num_warps}-{v.num_stages}"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of its own for tables; nothing is remembered of others."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    rule.forget()
    yield tmp_path / "tuned"
    monkeypatch.undo()
    rule.forget()


@pytest.mark.parametrize("segmented", [False, True], ids=["one adapter", "clients"])
@pytest.mark.parametrize(("kernel", "config"), SHIPPED, ids=name_of)
@on_a_gpu
def test_every_shipped_configuration_is_right(kernel, config, segmented):
    """In fp32 and fp16 where they are for it, and, compiled for a GPU, in bfloat16."""
    if not configs.fits(config, torch.device(DEVICE)):
        pytest.skip(f"not tested: these blocks are for sm_{config.arch} and newer, with {config.shared} bytes of shared memory")
    one_call(kernel, config, segmented, torch.float32 if config is configs.SHIPPED[kernel][0] else torch.float16)
    if DEVICE == "cuda":
        one_call(kernel, config, segmented, torch.bfloat16)


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
        assert oracles.dry or oracles.relative(actual, exact) < 4 * torch.finfo(actual.dtype).eps * 10

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


@on_a_gpu
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


def test_tables_go_with_their_offsets():
    rows, ranks = offsets((5, 70)), offsets((2, 3))
    before, of = len(tiles._KEPT), tiles.training_ranks(rows, ranks, 5)
    tiles.row_tiles(of, 32, torch.device("cpu"))
    tiles.clients(tiles.frozen_ranks(rows, torch.tensor([(0, 2), (1, 3)]), 3), torch.device("cpu"))
    assert len(tiles._KEPT) == before + 1
    del of, rows
    gc.collect()
    assert len(tiles._KEPT) == before


def test_equal_ranges_of_frozen_ranks_are_one_table():
    rows, ranges, device = offsets((5, 70)), torch.tensor([(0, 2), (1, 3)]), torch.device("cpu")
    tables = [tiles.clients(tiles.frozen_ranks(rows, ranges.clone(), 3), device) for _ in range(3)]
    assert all(table is tables[0] for table in tables) and len(tiles._KEPT[rows]) == 1
    assert tiles.clients(tiles.frozen_ranks(rows, ranges - ranges, 3), device).tolist() == [[0, 5, 0, 0], [5, 75, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_shape_gets_a_shipped_configuration_that_its_card_has(dtype, monkeypatch):
    device, pairs = torch.device("cpu"), set()
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
                    chosen = configs.dy_pass_config(M, 4096, ranks, dtype, device)
                    assert any(configs.replace(chosen, splits=c.splits) == c for c in configs.SHIPPED["dy_pass"])
                    assert chosen.block_r >= ranks
                for kernel in configs.SHIPPED if dtype == torch.bfloat16 else ():
                    if kernel == "dy_pass" and ranks > configs.ONE_PASS_RANKS:
                        continue
                    tried = configs.candidates(kernel, M, 4096, 4096, ranks, dtype, device)
                    assert tried[0] == configs.default(kernel, M, 4096, 4096, ranks, dtype, device)
                    assert len(tried) == len(set(tried)) and all(c.arch <= arch and c.shared <= shared for c in tried)
                    pairs |= {(kernel, configs.replace(c, splits=1)) for c in tried}
    if dtype == torch.bfloat16:                                   # nothing is shipped to be tried that no shape tries
        assert pairs >= {(kernel, configs.replace(c, splits=1)) for kernel, some in configs.TRIED.items() for c in some}


SHAPE = (8192, 4096, 4096, 16, False)


def write(folder, name, **entries):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"about": {}, "forms": {}, **entries}))
    rule.forget()


def test_a_measured_table_decides_and_its_absence_means_the_addmm_form(tables):
    assert rule._form("forward", *SHAPE, False, torch.bfloat16, "A Card 1") == rule.FLOOR
    assert rule._form("forward", *SHAPE[:-1], True, False, torch.bfloat16, "A Card 1") == rule.Form("triton", "torch")
    key = rule.shape_key("forward", *SHAPE, torch.bfloat16)
    assert key == "forward 8192x4096x4096 r16 bfloat16"
    write(tables, "a-card-1", forms={key: ["triton", "fused"]})
    for M in (6000, 8192, 11000):
        assert rule._form("forward", M, *SHAPE[1:], False, torch.bfloat16, "A Card 1") == rule.Form("triton", "fused")
    assert rule._form("backward", *SHAPE, False, torch.bfloat16, "A Card 1") == rule.FLOOR


def test_measured_blocks_decide_where_the_card_has_room_for_them(tables, monkeypatch):
    sizes, device = (8192, 0, 4096, 16, torch.bfloat16), torch.device("cpu")
    before, key = rule.blocks("shrink", *sizes, device), rule.blocks_key("shrink", *sizes)
    assert key == "shrink 8192x0x4096 r16 bfloat16" and before == configs.default("shrink", *sizes, device)
    other = configs.replace(configs.TRIED["shrink"][2], splits=8)
    write(tables, "interpreter", blocks={key: list(astuple(other)[:7])})
    assert rule.blocks("shrink", *sizes, device) == other != before
    assert rule.blocks("shrink", 9000, *sizes[1:], device) == other and rule.blocks("shrink", 512, *sizes[1:], device) != other
    monkeypatch.setattr(configs, "shared_of", lambda device: 101_376)
    rule.forget()
    assert rule.blocks("shrink", *sizes, device) == before
    write(tables, "interpreter", blocks={rule.blocks_key("dy_pass", 8192, 4096, 0, 24, torch.bfloat16): [128, 64, 0, 16, 1, 8, 2]})
    assert rule.blocks("dy_pass", 8192, 4096, 0, 24, torch.bfloat16, device).block_r >= 24        # a tile must hold all ranks


@pytest.mark.parametrize(("text", "said"), [
    ("{", "JSONDecodeError"), ("[]", "TypeError"), ('{"forms": 3}', "TypeError"), ("{}", "KeyError"),
    ('{"forms": {"forward 1x1x1 r1 float32": ["cublas", "fused"]}}', "1 of 1 entries"),
    ('{"forms": {}, "blocks": {"shrink 1x0x1 r1 float32": [1, 2, 3, 4, 5, 6, 7]}}', "1 of 1 entries"),
    ('{"forms": {}, "blocks": {"shrink 1x0x1 r1 float32": [64, 0, 128, 16, 99, 4, 3]}}', "1 of 1 entries"),
    ('{"forms": {}, "blocks": {"other 1x0x1 r1 float32": null}}', "1 of 1 entries")])
def test_a_table_that_cannot_be_understood_is_left_out_with_a_warning(tables, text, said):
    tables.mkdir()
    (tables / "a-card-1.json").write_text(text)
    with pytest.warns(UserWarning, match=f"a-card-1.json: .*{said}"):
        found = rule.table("A Card 1")
    assert not found.forms and not found.blocks


def test_cards_of_one_model_share_a_table_and_parts_of_a_card_do_not():
    names = {"NVIDIA H100 80GB HBM3": "nvidia-h100", "NVIDIA H100 PCIe": "nvidia-h100", "NVIDIA A100-SXM4-40GB": "nvidia-a100",
             "NVIDIA GeForce RTX 4090": "nvidia-geforce-rtx-4090", "interpreter": "interpreter",
             "NVIDIA H100 80GB HBM3 MIG 1g.10gb": "nvidia-h100-80gb-hbm3-mig-1g-10gb"}
    assert {name: rule.device_key(name) for name in names} == names


def test_sizes_round_to_the_nearest_power_of_two():
    rounded = [int(rule.shape_key("forward", n, 1, 1, 1, False, torch.float32).split()[1].split("x")[0]) for n in
               (0, 1, 2, 3, 5, 6, 11, 12, 8192, 11008, 14336, 28672)]
    assert rounded == [1, 1, 2, 4, 4, 8, 8, 16, 8192, 8192, 16384, 32768]



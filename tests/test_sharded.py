"""A base cut over two processes by FSDP2: adapters train on it, and merges reach every part, as on a base that is whole."""
import json

import pytest
import torch
from tiny import ROOT, llama, python
from torch import nn

import flora
from flora.sharded import holds_shards, is_sharded, own_adapters, put_away

CASES = ("llama-before", "llama-after", "gpt2-before", "gpt2-after", "merge-llama", "merge-gpt2", "merge-residual",
         "merge-outermost", "refused", "cohort")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, by case."""
    folder = tmp_path_factory.mktemp("sharded")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                  str(ROOT / "tests" / "sharded_processes.py"), str(folder), timeout=240)
    files = [folder / f"sharded-{k}.json" for k in range(2)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_on_shards_as_on_the_whole(found, case):
    """What the case does: the function that it calls in sharded_processes.py."""
    for one in found:
        assert one.get(case, "not reached: a case before it failed") is True, one[case]


def test_a_model_that_is_whole_is_left_as_it_is():
    model = llama()
    assert not holds_shards(model) and not put_away(model) and not is_sharded(None)
    weight, held = torch.zeros(4, 4), [flora.Adapter(torch.ones(1, 4), torch.ones(4, 1), 1.0)]
    assert own_adapters({"a": weight}.get, {"a": held}, "nearest") == {"a": held}
    merged = flora.merge(nn.Sequential(nn.Linear(4, 4, bias=False)), {"0": held[0]}, rounding="stochastic", seed=1)
    assert merged[0].weight.dtype == torch.float32

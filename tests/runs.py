"""What a run left in its folder, and the same run in fp64: for the tests that hold one engine to another."""
import pytest
import torch
from oracles import check_adapters

import flora
from flora import cohort
from flora.engines import prepare
from flora.formats import load_peft
from flora.report import read_metrics


def adapters(folder, number, what="aggregate"):
    return load_peft(folder / "rounds" / str(number) / what)


def clients(folder, number):
    """The adapters of the clients of a round, by name."""
    return {path.name: load_peft(path) for path in sorted((folder / "rounds" / str(number) / "clients").iterdir())}


def bits(folder):
    files = sorted(p.relative_to(folder) for p in (folder / "rounds").rglob("*.safetensors"))
    return {str(file): (folder / file).read_bytes() for file in files}


def failures(folder):
    return {(row["round"], row["client"]): row["reason"] for row in read_metrics(folder) if row["kind"] == "failure"}


def one_by_one(config, folder, dtype=torch.float32):
    """This run with its clients one after another, in this dtype: in fp32 what plain training comes to, in fp64 the oracle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "MOST_CLIENTS", 1)
        patch.setattr(prepare, "device_and_dtype", lambda config: (torch.device("cpu"), dtype))
        return flora.run(config.model_copy(update={"output_dir": str(folder)}))


def check_first_round(batched, plain, config, folder):
    """Asserts the error rule of every client's adapters after the first round and of their aggregate: clients in a batch against
    clients one by one (plain), both against fp64, in `folder`. Later rounds begin elsewhere, by AdamW, which makes signs of
    gradients that are next to nothing."""
    exact = one_by_one(config, folder, torch.float64)
    found = [clients(path, 0) for path in (batched, plain, exact)]
    assert list(found[0]) == list(found[1]) == list(found[2]) and len(found[0]) > 1
    assert all(a.A.dtype == torch.float64 for some in found[2].values() for a in some.values())
    for name in found[0]:
        check_adapters(*(some[name] for some in found), name)
    check_adapters(*(adapters(path, 0) for path in (batched, plain, exact)), "aggregate")

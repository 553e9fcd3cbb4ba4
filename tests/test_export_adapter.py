"""What three rounds of a run leave, as one adapter on the untouched base, is in PEFT what the run's own model is."""
import pytest
import torch
from oracles import check
from test_engines import settings
from tiny import llama
from transformers import AutoModelForCausalLM

import flora
from flora.formats import load_peft
from flora.group import concatenated
from flora.integrations.peft import portable, save

peft = pytest.importorskip("peft", reason="peft is not installed: what it loads of a run was not tested")
IDS = torch.arange(4, 28).reshape(2, 12)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def merged(place):
    """(the merged model's logits, what they are in fp64, the sum of the three rounds as one adapter)."""
    run = flora.run(settings(place, "merged", num_rounds=3, keep_rounds=3))
    whole = concatenated([load_peft(run / "rounds" / str(number) / "aggregate") for number in range(3)])
    exact = llama().double()
    for name, a in whole.items():
        exact.get_submodule(name).weight.data += a.delta()
    return logits(AutoModelForCausalLM.from_pretrained(run / "model")), logits(exact), whole


@pytest.mark.parametrize("write", [save, portable], ids=["save", "portable"])
def test_the_sum_of_three_rounds_gives_the_merged_models_logits(merged, write, tmp_path):
    """Ranks 15 + 15 + 15 in one folder."""
    plain, exact, whole = merged
    assert {a.rank for a in whole.values()} == {45}
    write(whole, tmp_path / "adapter", base_model="tiny")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    check(logits(loaded), plain, exact, torch.float32, "logits in PEFT")
    check(logits(loaded.merge_and_unload()), plain, exact, torch.float32, "logits merged by PEFT")
    assert float((logits(llama()) - exact).norm()) > 0.01 * float(exact.norm())


def test_a_run_that_keeps_the_sum_beside_the_base_saves_that_adapter(merged, place):
    run = flora.run(settings(place, "beside", num_rounds=3, merge_into="adapter"))
    found = logits(peft.PeftModel.from_pretrained(llama(), run / "adapter"))
    with torch.no_grad():
        model = llama()
        flora.nn.accumulate(model, load_peft(run / "adapter"))
    assert float((found - logits(model)).norm()) < 1e-5 * float(found.norm())
    assert float((found - merged[0]).norm()) < 1e-3 * float(found.norm())          # three rounds of training apart, in fp32

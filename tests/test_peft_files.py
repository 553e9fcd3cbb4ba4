"""The portable folder: one rank and scale 1 everywhere, so that whoever reads r, the tensors or no pattern gets the same ΔW."""
import json

import pytest
import safetensors.torch
import torch
from oracles import adapter, llama, relative
from peft_models import layers, logits, peft

import flora
from flora.adapter import Adapter
from flora.errors import AdapterError
from flora.integrations.peft import load, portable, save
from flora.nn import applied, target_shapes

KINDS = (lambda s: adapter(*s, 4, 8), lambda s: adapter(*s, 2, 12), lambda s: adapter(*s, 3, 3), lambda s: adapter(*s, 4, 8) * -1,
         lambda s: flora.stack([adapter(*s, 3, 8) * 0.25, adapter(*s, 4, 1) * 0.75]), lambda s: adapter(*s, 2, 2, torch.bfloat16))


def of_every_kind():
    """Mixed ranks and scales, a vector of scales, a negative one, one of ones, in fp32 and bf16, by layer."""
    return {name: KINDS[i % len(KINDS)](shape) for i, (name, shape) in enumerate(target_shapes(llama()).items())}


def as_others_read(folder):
    """(r, ΔW by layer) with alpha / r from the configuration alone: no patterns, no rsLoRA, as SGLang and vLLM; and the rank that
    llama.cpp takes from the tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if "lora_A" in key:
            B = tensors[key.replace("lora_A", "lora_B")].double()
            assert config["lora_alpha"] / A.shape[0] == config["lora_alpha"] / config["r"] == 1
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = B @ A.double()
    return config, found


def test_every_reader_gets_the_same_delta(tmp_path):
    some = of_every_kind()
    config, found = as_others_read(portable(some, tmp_path, base_model="someone/a-model"))
    assert set(found) == set(some) and all(relative(found[name], a.delta()) < 1e-6 for name, a in some.items())
    assert config["r"] == config["lora_alpha"] == 7 and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False and config["base_model_name_or_path"] == "someone/a-model"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert all(a.rank == 7 and relative(a.delta(), some[name].delta()) < 1e-6 for name, a in load(tmp_path).items())
    ours = llama(torch.float64)
    with applied(ours, some, dtype=torch.float64):
        expected = logits(ours)
    model = peft.PeftModel.from_pretrained(ours, tmp_path).double().eval()
    assert relative(logits(model), expected) < 1e-6 and set(layers(model))


def test_what_needs_no_fold_keeps_its_bits(tmp_path):
    some = {"x.q": adapter(7, 5, 3, 3, torch.bfloat16), "x.k": adapter(7, 5, 2, 2, torch.bfloat16)}
    back = load(portable(some, tmp_path))
    assert torch.equal(back["x.q"].A, some["x.q"].A) and torch.equal(back["x.k"].B[:, :2], some["x.k"].B)
    assert back["x.k"].B.dtype == torch.bfloat16 and not bool(back["x.k"].B[:, 2:].any())


def test_some_layers_of_a_name_stay_without_change(tmp_path):
    """Servers want last names; PEFT then makes adapters for all layers of the name, of which ours alone change anything."""
    name = "model.layers.1.self_attn.q_proj"
    some, model = {name: adapter(16, 16, 2)}, llama(torch.float64)
    with applied(model, some, dtype=torch.float64):
        expected = logits(model)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(model, portable(some, tmp_path)).double().eval()
    assert len(layers(loaded)) == 2 and relative(logits(loaded), expected) < 1e-6
    config, _ = as_others_read(portable({"0": adapter(7, 5, 2), "block.0": adapter(7, 5, 2)}, tmp_path / "numbers"))
    assert config["target_modules"] == ["0", "block.0"]                # "0" alone would match every list of modules


def test_large_ranks_are_compressed_where_that_is_exact_or_refused(tmp_path):
    wide = adapter(40, 900, 520)
    config, found = as_others_read(portable({"x.q": wide}, tmp_path / "exact"))
    assert config["r"] == 40 and relative(found["x.q"], wide.delta()) < 1e-6
    large = Adapter(torch.randn(513, 600), torch.randn(700, 513), 1.0)
    with pytest.raises(AdapterError, match=r"x.q: expected a rank of at most 512.*got 513\. Compress it first \(flora.compress"):
        portable({"x.q": large}, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(AdapterError, match="at least one layer"):
        portable({}, tmp_path / "nothing")


def test_save_and_load_are_each_others(tmp_path):
    some = of_every_kind()
    back = load(save(some, tmp_path, base_model="a"))
    assert all(back[name].rank == a.rank and relative(back[name].delta(), a.delta()) < 1e-6 for name, a in some.items())


def test_a_rank_that_the_configuration_does_not_say_is_refused(tmp_path):
    """alpha / r would be another number than the one it was trained with."""
    save({"x.q": adapter(7, 5, 3), "x.k": adapter(7, 5, 2)}, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes in ({"r": 5}, {"rank_pattern": {}}, {"rank_pattern": {"^x\\.k": 4}}):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(AdapterError, match=r"x\..: expected a rank of . as r and rank_pattern say|expected a rank of .,"):
            load(tmp_path)

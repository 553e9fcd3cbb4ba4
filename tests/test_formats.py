"""PEFT's folders: what we write PEFT reads to the same logits, what PEFT writes we read, what is not LoRA is named."""
import json
import shutil

import pytest
import safetensors.torch
import torch
from oracles import adapter, gpt2, llama, randomise, relative, tokens
from torch import nn

import flora
from flora.adapter import Adapter
from flora.errors import AdapterError
from flora.formats import load_peft, save_peft

peft = pytest.importorskip("peft", reason="peft is not installed: its folders were neither read nor written")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
MODELS = {"llama": llama, "gpt2": gpt2}


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def peft_layers(model):
    """PEFT's LoRA layers by the names that they have in the base model."""
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def of_every_kind(shapes):
    """Mixed ranks, mixed scales, weighted stacks with a scale vector, a negative and a zero scale, by layer."""
    kinds = [lambda s: adapter(*s, 4, 8), lambda s: adapter(*s, 4, 8), lambda s: adapter(*s, 2, 12), lambda s: adapter(*s, 7, 8),
             lambda s: flora.stack([adapter(*s, 3, 8) * 0.25, adapter(*s, 2, 1) * 0.75]), lambda s: adapter(*s, 4, 3),
             lambda s: adapter(*s, 4, 8) * -1, lambda s: adapter(*s, 2, 8) * 0, lambda s: adapter(*s, 16, 5)]
    return {name: kinds[i % len(kinds)](shape) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("which", ["every kind", "one kind", "few layers", "one name of two"])
def test_what_is_saved_peft_loads_to_the_same_logits(tmp_path, make, which):
    model = make(torch.float64)
    shapes = flora.nn.target_shapes(model)
    if which == "few layers":
        shapes = {name: shapes[name] for name in list(shapes)[:3]}
    if which == "one name of two":                                     # "c_proj" is in the attention and in the MLP
        shapes = {n: s for n, s in shapes.items() if n.endswith(("attn.c_proj", "0.self_attn.q_proj"))}
    some = {n: adapter(*s, 4) for n, s in shapes.items()} if which == "one kind" else of_every_kind(shapes)
    expected_model = make(torch.float64)
    expected_model.load_state_dict(model.state_dict())
    flora.merge(expected_model, some)
    expected = logits(expected_model)
    folder = save_peft(some, tmp_path / "adapter", "someone/a-model")
    loaded = peft.PeftModel.from_pretrained(model, folder).double().eval()
    assert relative(logits(loaded), expected) <= 1e-6
    layers = peft_layers(loaded)
    assert set(layers) == set(some)                                    # these layers and no other
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach()
        exact = some[name].delta().T if make is gpt2 else some[name].delta()
        assert delta.shape == exact.shape and (delta - exact).norm() <= 1e-6 * exact.norm()
    assert loaded.peft_config["default"].base_model_name_or_path == "someone/a-model"


def test_what_is_saved_is_read_back(tmp_path):
    some = of_every_kind(flora.nn.target_shapes(llama()))
    back = load_peft(save_peft(some, tmp_path / "a" / "b"))
    assert set(back) == set(some)
    for name, a in some.items():
        assert (back[name].delta() - a.delta()).norm() <= 1e-6 * a.delta().norm() and back[name].rank == a.rank
        if bool((a.scale == a.scale[0]).all()) and a.scale[0] > 0:     # bits, where nothing had to be folded
            assert torch.equal(back[name].A, a.A) and torch.equal(back[name].B, a.B)
    half = {"x.0": adapter(7, 5, 3, dtype=torch.bfloat16)}
    assert torch.equal(load_peft(save_peft(half, tmp_path / "half"))["x.0"].B, half["x.0"].B)
    stacked = {"x.0": flora.stack([half["x.0"] * 0.3, half["x.0"] * 0.7])}
    read = load_peft(save_peft(stacked, tmp_path / "stacked"))["x.0"]
    assert read.B.dtype == torch.float32 and relative(read.delta(), stacked["x.0"].delta()) <= 1e-6       # folded, not rounded


def test_a_name_that_ends_another_keeps_its_own_rank_and_alpha(tmp_path):
    """Patterns match from the start of a name: "0" is not "block.0"."""
    some = {"0": adapter(7, 5, 2, 9), "block.0": adapter(7, 5, 4, 3), "block.1": adapter(7, 5, 4, 3),
            "a.block.0": adapter(7, 5, 3, 1)}
    back = load_peft(save_peft(some, tmp_path))
    assert all(relative(back[name].delta(), a.delta()) <= 1e-6 for name, a in some.items())
    tree = nn.ModuleDict
    model = tree({"0": nn.Linear(5, 7), "block": tree({"0": nn.Linear(5, 7), "1": nn.Linear(5, 7)}),
                  "a": tree({"block": tree({"0": nn.Linear(5, 7)})})})
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(tmp_path), model)
    for name, a in some.items():
        layer = model.get_submodule(name)
        assert layer.r["default"] == a.rank and abs(layer.scaling["default"] - float(a.scale[0])) <= 1e-6 * float(a.scale[0])


def test_saving_nothing_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="at least one layer"):
        save_peft({}, tmp_path)


CONFIGS = {
    "plain": {}, "rslora": {"use_rslora": True}, "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
                 "alpha_pattern": {"k_proj": 5, "layers.0.mlp.up_proj": 3}},
    "patterns, rslora": {"use_rslora": True, "rank_pattern": {"^model.layers.0.self_attn.v_proj": 9, "v_proj": 1},
                         "alpha_pattern": {"o_proj": 2, ".*_proj": 11}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_is_read_with_its_scaling(tmp_path, name):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **CONFIGS[name])
    model = peft.get_peft_model(llama(), config)
    for layer in peft_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    base, ours = llama(torch.float64), load_peft(tmp_path)
    with flora.nn.applied(base, ours):
        expected = logits(base)
    # PEFT sorts patterns as it saves them: what counts where two match is what it reads from the folder
    model = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
    assert set(ours) == set(peft_layers(model)) and relative(logits(model), expected) <= 1e-6
    for layer, module in peft_layers(model).items():
        assert relative(ours[layer].delta(), module.get_delta_weight("default")) <= 1e-6, layer
        assert torch.equal(ours[layer].A, module.lora_A["default"].weight.float()) and ours[layer].rank == module.r["default"]


def test_peft_and_flora_give_one_answer_from_one_folder(tmp_path):
    for make in MODELS.values():
        base = make(torch.float64)
        folder = save_peft(randomise(flora.attach(base, rank=3, alpha=7), torch.float32), tmp_path / make.__name__)
        flora.detach(base)
        with flora.nn.applied(base, load_peft(folder)):
            ours = logits(base)
        loaded = peft.PeftModel.from_pretrained(base, folder).double().eval()
        assert relative(ours, logits(loaded)) <= 1e-6


REFUSED = {
    "use_dora": {"use_dora": True}, "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]}, "c_attn.bias|c_attn.base_layer.bias": {"bias": "all"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, name):
    model, targets = (gpt2(), ["c_attn"]) if "bias" in REFUSED[name] else (llama(tie_word_embeddings=False), ["q_proj"])
    config = peft.LoraConfig(**{"r": 2, "target_modules": targets, "task_type": "CAUSAL_LM", **REFUSED[name]})
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=name):
        load_peft(tmp_path)


def test_an_adapter_of_another_method_is_refused(tmp_path):
    peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
                        ).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="IA3"):
        load_peft(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return save_peft({"x.0": adapter(7, 5, 3)}, tmp_path / "saved")


BROKEN_CONFIGS = {"text": "{nonsense", "a list": "[]", "nothing": "",
                  "without r": json.dumps({"peft_type": "LORA", "lora_alpha": 1}),
                  "without alpha": json.dumps({"peft_type": "LORA", "r": 1}), "null": "null"}


@pytest.mark.parametrize("content", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_broken_configuration_is_refused(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=f"{folder}"):
        load_peft(folder)


def test_missing_and_broken_files_are_refused(folder, tmp_path):
    with pytest.raises(AdapterError, match="adapter_config.json and adapter_model.safetensors at .*nowhere"):
        load_peft(tmp_path / "nowhere")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).unlink()
        with pytest.raises(AdapterError, match=name):
            load_peft(copy)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for part in (b"", b"nonsense" * 9, whole[:-5], whole[:40]):
        (folder / "adapter_model.safetensors").write_bytes(part)
        with pytest.raises(AdapterError, match="adapter_model.safetensors"):
            load_peft(folder)


def test_a_factor_without_its_other_half_is_refused(folder):
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    a, b = sorted(tensors)
    for kept, match in (({a: tensors[a]}, "got only lora_A"), ({b: tensors[b]}, "got only lora_B"),
                        ({a: tensors[a], b: torch.zeros(7, 4)}, "expected A"),
                        ({**tensors, "lm_head.weight": torch.zeros(2)}, "lm_head"),
                        ({a: torch.zeros(3, 5, 1, 1), b: tensors[b]}, "expected A")):
        safetensors.torch.save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=match):
            load_peft(folder)
    assert isinstance(load_peft(save_peft({"x.0": adapter(7, 5, 3)}, folder))["x.0"], Adapter)

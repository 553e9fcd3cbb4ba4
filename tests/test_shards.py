"""`flora merge`: what PEFT saved, merged as PEFT merges it, shard by shard; and nothing that looks whole where anything failed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
import transformers
from oracles import relative
from safetensors.torch import load_file, save_file
from tiny import ROOT, llama, tokenizer

from flora.cli import main
from flora.errors import AdapterError, DataError, RunError, TargetError
from flora.shards import merge_files

RANKS = ((4, 8.0, False), (7, 3.0, True))


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=48, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": (llama, ["q_proj", "k_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "c_proj"])}


def save_adapters(folder, base, targets):
    """Two adapters that PEFT saves, of other ranks and alphas, one with rsLoRA."""
    paths = []
    for i, (rank, alpha, rslora) in enumerate(RANKS):
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=targets))
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        model.save_pretrained(folder / f"adapter{i}")
        paths.append(folder / f"adapter{i}")
    return paths


@pytest.fixture(scope="module", params=MODELS)
def place(request, tmp_path_factory):
    """(folder, base in several shards, adapters, the model's maker)"""
    folder = tmp_path_factory.mktemp(request.param)
    make, targets = MODELS[request.param]
    make().save_pretrained(folder / "base", max_shard_size="4KB")
    tokenizer().save_pretrained(folder / "base")
    assert len(list((folder / "base").glob("*.safetensors"))) > 3
    return folder, folder / "base", save_adapters(folder, folder / "base", targets), make


def state(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).state_dict()


def pefts(base, adapters, weights):
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base).double(), adapters[0], "a0")
    for i, path in enumerate(adapters[1:], 1):
        model.load_adapter(path, f"a{i}")
    model.add_weighted_adapter([f"a{i}" for i in range(len(adapters))], list(weights), "both", combination_type="cat")
    model.set_adapter("both")
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (-0.5, 2.0), None], ids=str)
def test_the_result_is_pefts_own_merge(place, tmp_path, weights, capsys):
    _, base, adapters, _ = place
    given = ["--weights", *map(str, weights)] if weights else []
    assert main(["merge", str(base), *map(str, adapters), "--out", str(tmp_path / "out"), *given]) == 0
    assert "merged 2 adapters, weights" in capsys.readouterr().out
    got, before, expected = state(tmp_path / "out"), state(base), pefts(base, adapters, weights or (0.5, 0.5))
    assert list(got) == list(before) == list(expected)
    for name, tensor in got.items():
        if torch.equal(expected[name], before[name].double()):
            assert torch.equal(tensor, before[name])
        else:
            assert relative(tensor, expected[name]) < 1e-6 < 1e-2 < relative(tensor, before[name])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_weights_keep_their_dtype_and_are_rounded_once(place, tmp_path, rounding):
    _, _, adapters, make = place
    make().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    merge_files(tmp_path / "half", adapters, tmp_path / "out", [0.5, 0.5], rounding=rounding, seed=1, quiet=True)
    merge_files(tmp_path / "half", adapters, tmp_path / "again", [0.5, 0.5], rounding=rounding, seed=1, quiet=True)
    got, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert {t.dtype for t in got.values()} == {torch.bfloat16} and all(torch.equal(t, again[n]) for n, t in got.items())
    expected = pefts(tmp_path / "half", adapters, (0.5, 0.5))
    changed = 0
    for name, tensor in state(tmp_path / "out").items():
        exact = expected[name]
        allowed = exact.abs() * 2.0 ** (-7 if rounding == "stochastic" else -8)
        assert bool(((tensor.double() - exact).abs() <= 1.01 * allowed).all())
        changed += not torch.equal(tensor.double(), exact.bfloat16().double())
    assert bool(changed) == (rounding == "stochastic")


def test_a_checkpoint_of_the_model_inside_is_read_by_its_own_names(tmp_path):
    """GPT-2's own files call a layer h.0..., not transformer.h.0..."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    paths = save_adapters(tmp_path, tmp_path / "base", ["c_attn"])
    inner = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    expected = pefts(tmp_path / "base", paths, (1.0, 1.0))
    save_file(inner, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    merge_files(tmp_path / "base", paths, tmp_path / "out", [1.0, 1.0], quiet=True)
    name = "transformer.h.0.attn.c_attn.weight"
    assert relative(state(tmp_path / "out")[name], expected[name]) < 1e-6


def broken(adapters, folder, **changes):
    """A copy of the first adapter with its tensors or configuration changed."""
    folder.mkdir()
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    for name, change in changes.items():
        if name == "config":
            config.update(change)
        else:
            tensors = change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def nan(tensors):
    last = list(tensors)[-1]
    tensors[last][-1, -1] = float("nan")
    return tensors


def test_bad_input_is_refused_before_anything_is_written(place, tmp_path):
    _, base, adapters, make = place
    quantised = tmp_path / "quantised"
    make().save_pretrained(quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    cases = [
        (AdapterError, "expected finite numbers", base, [adapters[1], broken(adapters, tmp_path / "nan", tensors=nan)], {}),
        (TargetError, "expected a linear module named", base, [broken(adapters, tmp_path / "name", tensors=lambda t: {
            n.replace(".0.", ".7."): v for n, v in t.items()})], {}),
        (TargetError, "expected an adapter for", base, [broken(adapters, tmp_path / "shape", tensors=lambda t: {
            n: v[:, :-1].contiguous() if "lora_A" in n else v for n, v in t.items()})], {}),
        (AdapterError, "use_dora", base, [broken(adapters, tmp_path / "dora", config={"use_dora": True})], {}),
        (AdapterError, "expected a PEFT folder", base, [tmp_path / "nowhere"], {}),
        (AdapterError, "expected at least one adapter", base, [], {}),
        (AdapterError, "one finite weight an adapter", base, adapters, {"weights": [1.0]}),
        (AdapterError, "one finite weight an adapter", base, adapters, {"weights": [1.0, float("nan")]}),
        (DataError, "no model at", tmp_path / "no" / "model", adapters, {}),
        (DataError, "quantised model", quantised, adapters, {}),
        (DataError, "model.safetensors", bare, adapters, {}),
    ]
    for error, words, model, given, options in cases:
        with pytest.raises(error, match=words):
            merge_files(model, given, out, quiet=True, **options)
        assert not out.exists()


def test_a_folder_that_exists_is_kept_unless_it_is_a_model_to_overwrite(place, tmp_path):
    _, base, adapters, _ = place
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for out, options in ((tmp_path / "mine", {}), (tmp_path / "mine", {"overwrite": True}), (base, {"overwrite": True}),
                         (base / "inside", {})):
        with pytest.raises(RunError, match="exists and is not a model|outside the base and the adapters"):
            merge_files(base, adapters, out, quiet=True, **options)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    merge_files(base, adapters, tmp_path / "empty", quiet=True)
    with pytest.raises(RunError, match="--overwrite"):
        merge_files(base, adapters, tmp_path / "empty", quiet=True)
    merge_files(base, adapters[:1], tmp_path / "empty", overwrite=True, quiet=True)


def test_the_folder_one_stands_in_and_names_like_others(place, tmp_path, monkeypatch):
    """--out ., --out beside a folder that looks like a stage of it, and names that a pattern would match."""
    _, base, adapters, _ = place
    keep = [tmp_path / name for name in (".merged-backup", ".flora-keep", ".xzq-keep")]
    for folder in keep:
        folder.mkdir()
        (folder / "thesis").write_text("years")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for out in (".", "..", here, "../here/"):
        with pytest.raises(RunError, match="one stands in"):
            merge_files(base, adapters, out, overwrite=True, quiet=True)
    merge_files(base, adapters, tmp_path / "merged", quiet=True)
    merge_files(base, adapters, tmp_path / "x*q", quiet=True)
    (tmp_path / "link").symlink_to(tmp_path / "merged")
    merge_files(base, adapters, tmp_path / "link", overwrite=True, quiet=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "merged").stat().st_mode & 0o055
    assert all((folder / "thesis").exists() for folder in keep)
    monkeypatch.chdir("/")
    with pytest.raises(RunError, match="not around them"):
        merge_files(tmp_path / "merged", adapters, tmp_path, overwrite=True, quiet=True)
    assert (tmp_path / "merged" / "config.json").exists()


def test_an_index_that_lies_is_refused_and_nothing_is_written_elsewhere(place, tmp_path):
    _, base, adapters, make = place
    outside = tmp_path / "x.safetensors"
    make().save_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", outside)
    before = outside.read_bytes()
    for number, change in enumerate((
            lambda names: dict.fromkeys(names, str(outside)), lambda names: dict.fromkeys(names, "../x.safetensors"),
            lambda names: dict.fromkeys(names, "missing.safetensors"), lambda names: {**names, "more": next(iter(names.values()))},
            list, lambda names: 3)):
        bad = tmp_path / f"bad{number}"
        shutil.copytree(base, bad)
        index = bad / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
        with pytest.raises(DataError, match="expected"):
            merge_files(bad, adapters, tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists() and outside.read_bytes() == before
    (bad / "config.json").write_text("half {")
    with pytest.raises(DataError, match="config.json"):
        merge_files(bad, adapters, tmp_path / "out", quiet=True)


KILLED = """
import sys, time
from flora import shards
write = shards.save_file
def slowly(*given):
    write(*given)
    print("shard", flush=True)
    time.sleep(60)
shards.save_file = slowly
shards.merge_files(sys.argv[1], sys.argv[2:3], sys.argv[3], quiet=True)
"""


def test_a_killed_merge_leaves_nothing_that_looks_whole(place, tmp_path):
    _, base, adapters, _ = place
    out, env = tmp_path / "out", {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", KILLED, str(base), str(adapters[0]), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout.readline() == "shard\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    time.sleep(0.1)
    left = [p.name for p in tmp_path.iterdir()]
    assert not out.exists() and len(left) == 1 and left[0].startswith(".flora-")
    merge_files(base, adapters, out, quiet=True)                          # and the next one clears what was left
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

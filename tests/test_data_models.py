"""Models: a folder, a GGUF file or a name becomes a model and its tokenizer."""

from pathlib import Path

import pytest
import torch
from data_helpers import make_tokenizer

import flora.data as data
from flora.data import models
from flora.errors import DataError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model of random weights with its tokenizer, which has no padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_local_folder_loads(saved):
    assert data.resolve_model(saved) == str(saved)
    assert data.load_model(saved, "bfloat16").dtype == torch.bfloat16
    tokenizer = data.load_tokenizer(saved)
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


def test_what_is_no_model_says_what_to_do(tmp_path, saved):
    (tmp_path / "config.json").write_text("{broken")
    for load in (data.load_model, data.load_tokenizer):
        with pytest.raises(DataError, match="could not be loaded.*smollm2-135m"):
            load(tmp_path)
    with pytest.raises(DataError, match="no model at"):
        data.resolve_model(tmp_path / "missing.gguf")
    with pytest.raises(DataError, match="0 .gguf files"):
        (tmp_path / "empty").mkdir()
        data.resolve_model(tmp_path / "empty")
    with pytest.raises(DataError, match="is a data set"):
        data.resolve_model("tweets")
    with pytest.raises(DataError, match="torch dtype"):
        data.load_model(saved, "float33")
    assert data.resolve_model("someone/a-model") == "someone/a-model"


def test_a_gguf_file_is_dequantised_once_per_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    made = []

    def dequantise(gguf, folder):
        made.append(gguf)
        (folder / "config.json").write_text(gguf.read_text())

    monkeypatch.setattr(models, "dequantise", dequantise)
    file = tmp_path / "shelf" / "a.gguf"
    file.parent.mkdir()
    file.write_text("one")
    folder = data.resolve_model(file)
    assert data.resolve_model(file.parent) == folder and len(made) == 1
    file.write_text("three")
    assert (Path(data.resolve_model(file)) / "config.json").read_text() == "three" and len(made) == 2


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(DataError, match="a.gguf"):
        data.load_model(file)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_dir()] == ["gguf"]


@pytest.mark.fetch
def test_the_real_model_answers():
    tokenizer, model = data.load_tokenizer("smollm2-135m"), data.load_model("smollm2-135m")
    row = {"prompt": "What is the capital of France?", "completion": "The capital of France is Paris."}
    tokens = data.tokenize(tokenizer, row, 64)
    start = [i for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True) if label == -100]
    with torch.no_grad():
        said = model.generate(torch.tensor([start]), max_new_tokens=12, do_sample=False)[0, len(start) :]
    assert "Paris" in tokenizer.decode(said)
    assert model.dtype == torch.float32 and tokenizer.pad_token is not None


def test_a_model_can_be_cut_to_its_first_blocks(tmp_path, caplog):
    import torch
    from tiny import llama, save_model

    save_model(tmp_path)
    short, whole = data.load_model(tmp_path, "float32", 1), llama()
    assert len(short.model.layers) == short.config.num_hidden_layers == 1 and "UNEXPECTED" not in caplog.text
    for name, weight in short.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name])
    assert len(data.load_model(tmp_path, "float32", 2).model.layers) == 2
    with pytest.raises(DataError, match="at least 3 blocks; it has 2"):
        data.load_model(tmp_path, "float32", 3)

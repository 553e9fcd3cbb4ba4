"""Models, tokenizers, rows and files so small that a whole federated run takes a second, made here and never downloaded."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from flora.adapter import Adapter

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["<pad>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = ("{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <eos> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}")
TARGETS = ("q_proj", "v_proj", "down_proj")


def llama(seed=0, dtype=torch.float32, **changes):
    """A causal LM of 2 blocks, 16 wide, its output embedding tied, as the small models of the field are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": 0,
                "eos_token_id": 1, "bos_token_id": 1, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)


def tokenizer():
    """One id a word, with a chat template; what is not a word is padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIALS + WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def save_model(folder, **changes):
    """A folder that `from_pretrained` loads: what `model_name_or_path` names in these tests."""
    llama(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path, count=60, people=4, seed=0):
    """A .jsonl of prompts of three words whose completions repeat them: quickly learnt. Columns prompt, completion, who, mood."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(draw.sample(WORDS[:12], 3))
            file.write(json.dumps({"prompt": text, "completion": text, "who": f"p{i % people}", "mood": f"m{i % 3}"}) + "\n")
    return path


def token_rows(count, seed=0, longest=12, prompt=2, vocabulary=48):
    """Rows of token ids of mixed lengths, no label on the first `prompt` tokens."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(2, vocabulary) for _ in range(draw.randint(prompt + 2, longest))]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def adapter(rank, shape, seed=0, alpha=None, dtype=torch.float32):
    """An adapter (out, in) = shape with both factors random; alpha 2r unless given."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    A = torch.randn(rank, shape[1], generator=draw, dtype=torch.float64) / shape[1] ** 0.5
    B = torch.randn(shape[0], rank, generator=draw, dtype=torch.float64)
    return Adapter(A.to(dtype), B.to(dtype), (2.0 * rank if alpha is None else alpha) / rank)


class Plain(torch.nn.Module):
    """A causal model that knows neither logits_to_keep nor use_cache."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Int8Linear(torch.nn.Module):
    """A weight-only int8 linear: codes and one step a row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("step", step)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight * self.step).to(x.dtype), self.bias)


def quantise(model):
    """Every linear but the head replaced by its int8 codes."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                module._modules[name] = Int8Linear(child)
    return model


def dense(a):
    """B diag(scale) A in fp64, written out here and not taken from the code under test."""
    return a.B.double() @ torch.diag(a.scale.double()) @ a.A.double()


def same(one, other):
    """Two sets of adapters with the same layers and the same bits."""
    return list(one) == list(other) and all(
        torch.equal(getattr(one[n], f), getattr(other[n], f)) for n in one for f in ("A", "B", "scale"))


def near(one, other, tolerance=1e-5):
    """Two sets of adapters with the same layers and ranks whose factors differ by rounding: batches of other sizes sum in another
    order. In fp64; the loss is taken in fp32, and AdamW divides by the gradient's own size."""
    return list(one) == list(other) and all(
        float((getattr(one[n], f) - getattr(other[n], f)).norm()) <= tolerance * float(getattr(other[n], f).norm())
        for n in one for f in ("A", "B", "scale"))


def python(*arguments, cwd=None, timeout=120):
    """Runs python with this checkout importable; gives the finished process with its output as text."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "132", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=timeout, env=env,
                          check=False)


def tracked(*patterns):
    """The files of the checkout that match, without what a build or an environment left there."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return [ROOT / name for name in found.stdout.split("\n") if name and (ROOT / name).exists()]
    return [path for pattern in patterns for path in ROOT.glob(pattern.replace("/*", "/**/*"))
            if path.is_file() and path.suffix not in (".so", ".pyc")]

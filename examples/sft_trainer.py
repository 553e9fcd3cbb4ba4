"""TRL's SFTTrainer, unchanged, on a PEFT model that flora computes: one line, and the adapter is saved as PEFT saves it."""
import copy
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from flora.integrations.peft import accelerate

torch.manual_seed(0)
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(62))]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")


base = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=1))
text = [" ".join(f"w{(start + i) % 62}" for i in range(10)) for start in range(48)]              # everybody counts on
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"))
accelerate(model)                                                                       # the one line

with tempfile.TemporaryDirectory() as folder:
    settings = SFTConfig(folder, max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=10, use_cpu=True,
                         bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_dict({"text": text}), processing_class=tokenizer())
    trainer.train()
    trainer.save_model(folder)
    served = PeftModel.from_pretrained(copy.deepcopy(model).unload(), folder)                   # plain PEFT reads it

ids = torch.arange(2, 12)[None]
with torch.no_grad():
    wanted, found = model.eval()(ids).logits, served.eval()(ids).logits
off = (found - wanted).norm() / wanted.norm()
print("losses", " ".join(f"{entry['loss']:.3f}" for entry in trainer.state.log_history if "loss" in entry))
print(f"what PEFT loads is off by {float(off):.1e}")

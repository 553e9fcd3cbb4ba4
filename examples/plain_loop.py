"""A federated loop of one's own on PEFT: clients of ranks 8, 4 and 2; PEFT trains and merges, flora computes and aggregates."""
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flora.integrations.peft import accelerate, aggregate

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes))
configs = [LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM") for r in (8, 4, 2)]
rows = [(torch.arange(12) + torch.randint(64, (n, 1))) % 64 for n in (24, 12, 6)]       # every client counts on from somewhere
held_out = (torch.arange(12) + torch.randint(64, (16, 1))) % 64


def train(model: PeftModel, tokens: Tensor) -> dict[str, Tensor]:
    """One client's round: its adapter's state dict."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(8):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}


for number in range(3):
    states = []
    for config, tokens in zip(configs, rows, strict=True):
        model = accelerate(get_peft_model(base, config))
        states.append(train(model, tokens))
        model.unload()                                                                  # the base, as it was
    state, config = aggregate(states, weights=[len(tokens) for tokens in rows], configs=configs, strategy="flora")
    model = get_peft_model(base, config)                                                # rank 8 + 4 + 2: Σ p_k ΔW_k, exactly
    set_peft_model_state_dict(model, state)
    base = model.merge_and_unload()
    print(f"round {number}: held-out loss {base(input_ids=held_out, labels=held_out).loss.item():.3f}")

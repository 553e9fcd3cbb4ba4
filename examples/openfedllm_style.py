"""What one line changes in a FedAvg of PEFT adapters: the mean of the factors is not the mean of the updates."""
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from flora.integrations.peft import aggregate

NAME = "base_model.model.model.layers.0.self_attn.q_proj"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def model_of(config, state=None):
    """A PEFT model with this adapter, or with one that some training has moved."""
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)
    if state is None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        set_peft_model_state_dict(model, state)
    return model


torch.manual_seed(0)
config, weights = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), [50, 30, 20]
clients = [model_of(config) for _ in weights]
states = [get_peft_model_state_dict(model) for model in clients]
deltas = [model.get_submodule(NAME).get_delta_weight("default").detach().double() for model in clients]
exact = sum(w / 100 * delta for w, delta in zip(weights, deltas, strict=True))

# before:
averaged = {key: sum(w / 100 * s[key] for w, s in zip(weights, states, strict=True)) for key in states[0]}
# after:
stacked, whole = aggregate(states, weights, config)                     # and clients may differ in rank, alpha and layers

for name, made in (("FedAvg of the factors", model_of(config, averaged)), ("flora.integrations.peft", model_of(whole, stacked))):
    delta = made.get_submodule(NAME).get_delta_weight("default").detach().double()
    print(f"{name}: off by {float((delta - exact).norm() / exact.norm()):.1e} of Σ p_k ΔW_k")

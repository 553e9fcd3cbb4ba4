"""Facts about models and data sets of the hub that papers use: what a plan needs where the hub is not reached.

Architectures are those of the models' own config.json; rows are those of the train split (ShareGPT's and Wizard's: as
their names say).
"""

_LLAMA = {"model_type": "llama", "vocab_size": 32_000, "hidden_act": "silu", "tie_word_embeddings": False}
_SEVEN = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_TINY = {
    **_LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}

ARCHITECTURES = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINY,
    "huggyllama/llama-7b": _SEVEN,
    "meta-llama/Llama-2-7b-hf": _SEVEN,
}
ROWS = {
    "databricks/databricks-dolly-15k": 15_011,
    "tatsu-lab/alpaca": 52_002,
    "WizardLM/WizardLM_evol_instruct_70k": 70_000,
    "RyokoAI/ShareGPT52K": 52_000,
}

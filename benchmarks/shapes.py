"""The shapes that are measured: (name, out_features, in_features) of the linears of a decoder layer."""


def decoder(hidden: int, kv: int, intermediate: int) -> list[tuple[str, int, int]]:
    """The seven linears of a Llama layer."""
    return [("q_proj", hidden, hidden), ("k_proj", kv, hidden), ("v_proj", kv, hidden), ("o_proj", hidden, hidden),
            ("gate_proj", intermediate, hidden), ("up_proj", intermediate, hidden), ("down_proj", hidden, intermediate)]


# Which of a layer's inputs a linear reads.
READS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
SMOLLM2_135M = decoder(576, 192, 1536)
MODELS = {"SmolLM2-135M": SMOLLM2_135M, "1B": decoder(2048, 512, 8192), "3B": decoder(3072, 1024, 8192),
          "7B": decoder(4096, 4096, 11008), "70B": decoder(8192, 1024, 28672),
          "tiny": decoder(64, 32, 176)}
SQUARE = [("2048 x 2048", 2048, 2048)]
# ranks of ten clients: FLoRA, arXiv 2409.05976, section 4
RANKS = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
# Whole models of random weights: what LlamaConfig is given.
RANDOM = {"tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                             "num_key_value_heads": 4, "vocab_size": 32_000},
          "tiny-llama": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "vocab_size": 32_000}}

"""The shapes that are measured: (name, out_features, in_features) of the linears of a decoder layer."""


def decoder(hidden: int, kv: int, intermediate: int) -> list[tuple[str, int, int]]:
    """The seven linears of a Llama layer."""
    return [("q_proj", hidden, hidden), ("k_proj", kv, hidden), ("v_proj", kv, hidden), ("o_proj", hidden, hidden),
            ("gate_proj", intermediate, hidden), ("up_proj", intermediate, hidden), ("down_proj", hidden, intermediate)]


SMOLLM2_135M = decoder(576, 192, 1536)
MODELS = {"SmolLM2-135M": SMOLLM2_135M, "1B": decoder(2048, 512, 8192), "3B": decoder(3072, 1024, 8192),
          "7B": decoder(4096, 4096, 11008), "70B": decoder(8192, 1024, 28672)}
SQUARE = [("2048 x 2048", 2048, 2048)]
# ranks of ten clients: FLoRA, arXiv 2409.05976, section 4
RANKS = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]

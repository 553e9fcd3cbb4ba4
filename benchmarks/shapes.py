"""The shapes that are measured: (name, out_features, in_features) of the linears of a decoder layer."""
SMOLLM2_135M = [("q_proj", 576, 576), ("k_proj", 192, 576), ("v_proj", 192, 576), ("o_proj", 576, 576),
                ("gate_proj", 1536, 576), ("up_proj", 1536, 576), ("down_proj", 576, 1536)]
SQUARE = [("2048 x 2048", 2048, 2048)]
# ranks of ten clients: FLoRA, arXiv 2409.05976, section 4
RANKS = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]

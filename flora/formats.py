"""PEFT's folder format, in and out: adapter_config.json and adapter_model.safetensors.

PEFT has one scaling a module, alpha / r; a scale vector that is not constant (a stack of weighted clients) is folded into B,
in fp32, and alpha becomes r. Ranks and scales that differ by layer go into rank_pattern and alpha_pattern.
"""
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from flora.adapter import Adapter, Adapters, fold
from flora.errors import AdapterError

_PREFIX = "base_model.model."
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "use_qalora",
            "alora_invocation_tokens")
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")       # what PEFT subtracts from the base weights at the start


def _one_scale(a: Adapter) -> Adapter:
    """The adapter with one scale for all its ranks, folded (in fp32) where they differ."""
    if bool((a.scale == a.scale[0]).all()) and float(a.scale[0]) > 0:
        return a
    return fold(Adapter(a.A.float(), a.B.float(), a.scale))


def save_peft(adapters: Adapters, path: str | Path, base_model: str | None = None) -> Path:
    """Writes adapters as a folder that `peft.PeftModel.from_pretrained` loads, with the same ΔW. Returns the folder.

    Raises AdapterError for no adapters.
    """
    if not adapters:
        raise AdapterError("expected adapters of at least one layer to save; got none")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    single = {layer: _one_scale(a) for layer, a in adapters.items()}
    rank = Counter(a.rank for a in single.values()).most_common(1)[0][0]
    alpha = {layer: float(a.scale[0]) * a.rank for layer, a in single.items()}
    common = Counter(alpha[layer] for layer, a in single.items() if a.rank == rank).most_common(1)[0][0]
    # PEFT completes a pattern to (.*\.)?(pattern)$; escaped whole names from ^ on match one layer each. Last names as
    # target_modules would give adapters to other modules too ("c_proj" is in GPT-2's attention and in its MLP)
    ranks = {f"^{re.escape(layer)}": a.rank for layer, a in single.items() if a.rank != rank}
    alphas = {f"^{re.escape(layer)}": alpha[layer] for layer in single if alpha[layer] != common}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank,
              "lora_alpha": common, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": False, "bias": "none",
              "lora_dropout": 0.0, "inference_mode": True, "target_modules": list(single)}
    tensors = {}
    for layer, a in single.items():
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a.A.detach().cpu().clone(memory_format=torch.contiguous_format)
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = a.B.detach().cpu().clone(memory_format=torch.contiguous_format)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def _by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the layer's name."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), default)


def peft_scaling(config: Mapping[str, Any], layer: str) -> float:
    """alpha / r of a layer, or alpha / √r for rsLoRA, with rank_pattern and alpha_pattern."""
    rank = _by_pattern(config.get("rank_pattern") or {}, layer, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, layer, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def load_peft(path: str | Path) -> dict[str, Adapter]:
    """The adapters of a PEFT folder by qualified layer name, with each layer's scale.

    Raises AdapterError where a file is missing or unreadable, or the folder uses what is not plain LoRA (named).
    """
    path = Path(path)
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"expected a PEFT folder with adapter_config.json and adapter_model.safetensors at {path}; got "
                           f"{error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise AdapterError(f"{path}: expected the configuration of a LoRA adapter, with r and lora_alpha; got {config}")
    used = [name for name in _REFUSED if config.get(name)]
    if str(config.get("init_lora_weights")).startswith(_CHANGE_BASE):
        used.append(f"init_lora_weights={config['init_lora_weights']!r} (its base is not the model's)")
    if used:
        raise AdapterError(f"{path}: expected plain LoRA; got {', '.join(used)}, which an exact ΔW = B diag(scale) A does not "
                           "cover")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if not found:
            raise AdapterError(f"{path}: expected lora_A and lora_B weights of linear layers; got {key}")
        layers.setdefault(found[1], {})[found[2]] = tensor
    for layer, pair in layers.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path}: expected lora_A and lora_B of {layer}; got only lora_{next(iter(pair))}")
    return {layer: Adapter(pair["A"], pair["B"], peft_scaling(config, layer)) for layer, pair in layers.items()}

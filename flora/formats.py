"""PEFT's format, in and out: its configuration and tensors, and the folder (adapter_config.json, adapter_model.safetensors).

PEFT has one scaling a module, alpha / r; a scale vector that is not constant (a stack of weighted clients) is folded into B,
in fp32, and alpha becomes r. Ranks and scales that differ by layer go into rank_pattern and alpha_pattern, which other readers
than PEFT do not know: for them there is the portable form, one rank and scale 1 everywhere.
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

from flora.adapter import Adapter, Adapters, compress, fold, pad
from flora.errors import AdapterError

PREFIX = "base_model.model."
PORTABLE_RANK = 512                                                  # the largest that vLLM takes
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "use_qalora",
            "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication")
_KEY = re.compile(rf"(?P<prefix>{re.escape(PREFIX)})?(?P<layer>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")       # what PEFT subtracts from the base weights at the start


def _one_scale(a: Adapter) -> Adapter:
    """The adapter with one scale for all its ranks, folded (in fp32) where they differ."""
    if bool((a.scale == a.scale[0]).all()) and float(a.scale[0]) > 0:
        return a
    return fold(Adapter(a.A.float(), a.B.float(), a.scale))


def peft_form(adapters: Adapters, prefix: str = PREFIX) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, configuration) of adapters as PEFT has them: keys with this prefix in the adapters' order, copies on the CPU; what
    adapter_config.json says of r, alpha, patterns and targets. Raises AdapterError for no adapters.
    """
    if not adapters:
        raise AdapterError("expected adapters of at least one layer to save; got none")
    single = {layer: _one_scale(a) for layer, a in adapters.items()}
    rank = Counter(a.rank for a in single.values()).most_common(1)[0][0]
    alpha = {layer: float(a.scale[0]) * a.rank for layer, a in single.items()}
    common = Counter(alpha[layer] for layer, a in single.items() if a.rank == rank).most_common(1)[0][0]
    # PEFT completes a pattern to (.*\.)?(pattern)$; escaped whole names from ^ on match one layer each. Last names as
    # target_modules would give adapters to other modules too ("c_proj" is in GPT-2's attention and in its MLP)
    ranks = {f"^{re.escape(layer)}": a.rank for layer, a in single.items() if a.rank != rank}
    alphas = {f"^{re.escape(layer)}": alpha[layer] for layer in single if alpha[layer] != common}
    return _tensors(single, prefix), _config(rank, common, list(single)) | {"rank_pattern": ranks, "alpha_pattern": alphas}


def _tensors(adapters: Adapters, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    return {f"{prefix}{layer}.lora_{factor}.weight": getattr(a, factor).detach().cpu().clone(memory_format=torch.contiguous_format)
            for layer, a in adapters.items() for factor in ("A", "B")}


def _config(rank: int, alpha: float, targets: list[str]) -> dict[str, Any]:
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank, "lora_alpha": alpha,
            "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "bias": "none", "lora_dropout": 0.0,
            "inference_mode": True, "target_modules": targets}


def _write(path: str | Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base_model: str | None) -> Path:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(tensors), path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base_model}, indent=2) + "\n")
    return path


def save_peft(adapters: Adapters, path: str | Path, base_model: str | None = None) -> Path:
    """Writes adapters as a folder that `peft.PeftModel.from_pretrained` loads, with the same ΔW. Returns the folder.

    base_model: what its configuration names as the base. Raises AdapterError for no adapters.
    """
    return _write(path, *peft_form(adapters), base_model)


def save_portable(adapters: Adapters, path: str | Path, base_model: str | None = None) -> Path:
    """Writes adapters as a folder that PEFT, vLLM, SGLang and llama.cpp read alike: one rank R, scale 1, no patterns.

    Scales are folded into B (in fp32, where they are not 1), every layer is padded with zeros to the largest rank R, and
    r = lora_alpha = R, so alpha / r = 1 for whoever reads r, the tensors, or no pattern. target_modules are last names, as servers
    expect them; layers that share one and have no adapter get one of ΔW = 0 in PEFT. A rank above 512, the most that vLLM takes,
    is compressed where that is exact (min(out, in) <= 512). base_model: what the configuration names as the base. Returns the
    folder. Raises AdapterError for any other rank, and for no adapters.
    """
    if not adapters:
        raise AdapterError("expected adapters of at least one layer to save; got none")
    folded = {layer: _unscaled(layer, a) for layer, a in adapters.items()}
    rank = max(a.rank for a in folded.values())
    last = sorted({layer.rpartition(".")[2] for layer in folded})
    targets = list(folded) if any(name.isdigit() for name in last) else last
    return _write(path, _tensors({layer: pad(a, rank) for layer, a in folded.items()}), _config(rank, rank, targets), base_model)


def _unscaled(layer: str, a: Adapter) -> Adapter:
    """The same ΔW with scale ones, at a rank that every server takes."""
    if a.rank > PORTABLE_RANK:
        if min(a.shape) > PORTABLE_RANK:
            raise AdapterError(f"{layer}: expected a rank of at most {PORTABLE_RANK}, the most that vLLM takes; got {a.rank}. "
                               f"Compress it first (flora.compress(adapter, {PORTABLE_RANK})), or merge it into the model "
                               "(flora merge) and serve that.")
        a = compress(Adapter(a.A.float(), a.B.float(), a.scale))
    return a if bool((a.scale == 1).all()) else fold(Adapter(a.A.float(), a.B.float(), a.scale))


def _by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the layer's name."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), default)


def peft_scaling(config: Mapping[str, Any], layer: str) -> float:
    """alpha / r of a layer, or alpha / √r for rsLoRA, by a config with rank_pattern and alpha_pattern."""
    rank = _by_pattern(config.get("rank_pattern") or {}, layer, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, layer, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def check_plain(config: object, where: object) -> None:
    """Raises AdapterError, which begins with `where`, unless config is that of plain LoRA; it names what is not."""
    if not isinstance(config, Mapping) or config.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise AdapterError(f"{where}: expected the configuration of a LoRA adapter, with r and lora_alpha; got {config}")
    used = [name for name in _REFUSED if config.get(name)]
    if str(config.get("init_lora_weights")).startswith(_CHANGE_BASE):
        used.append(f"init_lora_weights={config['init_lora_weights']!r} (its base is not the model's)")
    if used:
        raise AdapterError(f"{where}: expected plain LoRA; got {', '.join(used)}, which an exact ΔW = B diag(scale) A does not "
                           "cover")


def adapters_of(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], where: object) -> dict[str, Adapter]:
    """The adapters in PEFT's tensors by layer, in the order of the keys, with each layer's scale. Nothing is copied.

    Keys: [base_model.model.]LAYER.lora_A[.ADAPTER].weight; with the prefix or without it, of one adapter. Raises AdapterError,
    which begins with `where`, for other keys, half a pair, shapes that do not fit, and a rank that config does not say.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    forms = set()
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if not found or PREFIX in found["layer"]:
            raise AdapterError(f"{where}: expected lora_A and lora_B weights of linear layers; got {key}")
        forms.add((found["prefix"], found["adapter"]))
        layers.setdefault(found["layer"], {})[found["factor"]] = tensor.detach()
    if len(forms) > 1:
        raise AdapterError(f"{where}: expected the keys of one adapter, all with or all without {PREFIX!r}; got prefixes and "
                           f"adapter names {sorted(forms, key=str)}. Use peft.get_peft_model_state_dict(model, adapter_name=...).")
    return {layer: _adapter(pair, config, layer, where) for layer, pair in layers.items()}


def _adapter(pair: Mapping[str, torch.Tensor], config: Mapping[str, Any], layer: str, where: object) -> Adapter:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{where}: expected lora_A and lora_B of {layer}; got only lora_{next(iter(pair))}")
    try:
        adapter = Adapter(pair["A"], pair["B"], peft_scaling(config, layer))
    except AdapterError as error:
        raise AdapterError(f"{where}, {layer}: {error}") from error
    rank = _by_pattern(config.get("rank_pattern") or {}, layer, config["r"])
    if adapter.rank != rank:
        raise AdapterError(f"{where}, {layer}: expected a rank of {rank}, as r and rank_pattern say; got {adapter.rank}. Is it the "
                           "configuration of these tensors? alpha / r follows from it.")
    return adapter


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
    check_plain(config, path)
    return adapters_of(tensors, config, path)

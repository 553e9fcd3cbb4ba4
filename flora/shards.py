"""`flora merge`: PEFT adapters of any ranks into a model's folder, shard by shard, in the memory of the largest shard.

The names, shapes and orientation of all layers come from the model's own classes, built without weights; everything is checked
before the first shard is read, and the folder appears under its name only when it is whole.
"""
import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flora import ops
from flora.adapter import Adapter, Adapters, all_layers
from flora.data import resolve_model
from flora.errors import AdapterError, DataError, RunError
from flora.files import staged
from flora.formats import load_peft
from flora.layer import matrix
from flora.seeds import derive
from flora.targets import bases_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", INDEX)


def _folder(base: str | Path) -> Path:
    """The model's folder: local, fetched by name, or the hub's."""
    where = resolve_model(base)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(where, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # a dozen classes for one fact: it is not to be had
        raise DataError(f"expected a model's folder, a fetched name or a name of the hub; got {base!r}, which cannot be downloaded "
                        f"({type(error).__name__}: {str(error).splitlines()[0]})") from error


def _empty_model(folder: Path) -> "PreTrainedModel":
    """The model of a folder without weights: what its layers are called, and how they lie."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        cls = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0])
        with torch.device("meta"):
            model = getattr(cls, "_from_config", None) or cls.from_config
            return model(config)
    except Exception as error:  # whatever a configuration that is not one makes transformers raise
        raise DataError(f"expected a folder that transformers can build a model from, at {folder}; got {type(error).__name__}: "
                        f"{str(error).splitlines()[0]}") from error


def _shards(folder: Path) -> dict[str, str]:
    """The file of every tensor. Raises DataError where there are no safetensors."""
    index = folder / INDEX
    try:
        if index.exists():
            places = dict(json.loads(index.read_text())["weight_map"])
            for file in sorted(set(places.values())):
                if Path(file).name != file or not (folder / file).is_file():
                    raise DataError(f"{index}: expected the names of files beside it; got {file!r}, which is none")
                with safe_open(folder / file, "pt") as opened:
                    strays = {n for n, where in places.items() if where == file} - set(opened.keys())
                if strays:
                    raise DataError(f"{index}: expected {sorted(strays)[0]} in {file}; it is not there")
            return places
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise DataError(f"expected model.safetensors, or shards with {INDEX}, in {folder}; got "
                            f"{[f.name for f in files] or 'none'}. Save the model with save_pretrained first.")
        with safe_open(files[0], "pt") as file:
            return dict.fromkeys(file.keys(), files[0].name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: expected readable safetensors; got {type(error).__name__}: {error}") from error


def _tensor_names(model: "PreTrainedModel", layers: Sequence[str], tensors: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The checkpoint's name of each layer's weight: the module's own, with or without the prefix of the model inside."""
    prefix, out = model.base_model_prefix, {}
    for layer in layers:
        name = f"{layer}.weight"
        found = [n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in tensors]
        if not found:
            raise DataError(f"{layer}: expected its weight in {folder} as {name}; the safetensors there have none. Load the model "
                            "with transformers, use flora.merge, and save it.")
        out[layer] = found[0]
        with safe_open(folder / tensors[found[0]], "pt") as file:
            dtype = file.get_slice(found[0]).get_dtype()
        if dtype not in ("F32", "F64", "F16", "BF16"):
            raise DataError(f"{layer}: expected a weight in float32, float64, float16 or bfloat16; got {dtype}")
    return out


def merge_files(base: str | Path, adapters: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None, *,
                rounding: ops.Rounding = "nearest", seed: int = 0, overwrite: bool = False, quiet: bool = False) -> Path:
    """Writes base + Σ p_k ΔW_k to the folder `out`, which transformers loads like the base. Returns it.

    base: a folder with config.json and safetensors, a fetched name, or a hub's; adapters: PEFT folders of any ranks and alphas;
    weights: the p_k as they are (None: 1 / K each). Memory: the largest shard and the adapters. Weights keep their dtype, and are
    rounded once (rounding, seed: as ops.merge_many_). Raises DataError, AdapterError, TargetError before anything is written,
    RunError.
    """
    if not adapters:
        raise AdapterError("expected at least one adapter to merge; got none")
    p = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(p) != len(adapters) or not all(math.isfinite(one) for one in p):
        raise AdapterError(f"expected one finite weight an adapter, {len(adapters)} of them; got {p}")
    source, target = _folder(base), Path(out).expanduser()
    _check_target([source, *map(Path, adapters)], target, overwrite)
    try:
        quantised = json.loads((source / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{source}: expected a readable config.json; got {type(error).__name__}: {error}") from error
    if quantised:
        raise DataError(f"{source}: expected weights in floating point; got a quantised model. Merge into the model it was made "
                        "of, or keep the update beside it (merge_into: adapter).")
    parties = [{layer: a * one for layer, a in load_peft(path).items()} for path, one in zip(adapters, p, strict=True)]
    model, bases = _empty_model(source), {}
    for path, party in zip(adapters, parties, strict=True):
        bases |= bases_of(model, party)
        for layer, a in party.items():
            if not all(bool(torch.isfinite(t).all()) for t in (a.A, a.B, a.scale)):
                raise AdapterError(f"{path}, {layer}: expected finite numbers; got NaN or infinity. Leave the adapter out.")
    turned = {layer for layer, module in bases.items() if matrix(module) is not module.weight}
    tensors = _shards(source)
    places = _tensor_names(model, all_layers(parties), tensors, source)
    try:
        with staged(target) as stage:
            _write(source, stage, tensors, places, turned, parties, rounding, seed, quiet)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write to {target}: {error}. Nothing was left there; make room, or choose another --out.") from error
    return target


def _check_target(sources: Sequence[Path], target: Path, overwrite: bool) -> None:
    """Raises RunError where writing to target would replace what is read, or what the user may want to keep."""
    own, here = target.resolve(), Path.cwd().resolve()
    if own == here or own in here.parents:
        raise RunError(f"expected an --out that is not the folder one stands in, or around it; got {target}")
    for source in (source.expanduser().resolve() for source in sources):
        if own == source or source in own.parents or own in source.parents:
            raise RunError(f"expected an --out outside the base and the adapters, and not around them; got {target}, and {source}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not (target / "config.json").is_file():
            raise RunError(f"{target} exists and is not a model, so it is not replaced. Choose another --out.")
        if not overwrite:
            raise RunError(f"{target} exists already. Choose another --out, or replace it with --overwrite.")


def _write(source: Path, stage: Path, tensors: Mapping[str, str], places: Mapping[str, str], turned: set[str],
           parties: Sequence[Adapters], rounding: ops.Rounding, seed: int, quiet: bool) -> None:
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, stage / path.name)
    if (source / INDEX).exists():
        shutil.copyfile(source / INDEX, stage / INDEX)
    files = sorted(set(tensors.values()))
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn()
    with Progress(*columns, disable=quiet, transient=True) as progress:
        task = progress.add_task("", total=sum((source / file).stat().st_size for file in files))
        for file in files:
            progress.update(task, description=file)
            layers = [layer for layer, name in places.items() if tensors[name] == file]
            if layers:
                here = {layer: places[layer] for layer in layers}
                _merge_shard(source / file, stage / file, here, turned, parties, rounding, seed)
            else:
                shutil.copyfile(source / file, stage / file)
            progress.advance(task, (source / file).stat().st_size)


def _merge_shard(source: Path, target: Path, places: Mapping[str, str], turned: set[str], parties: Sequence[Adapters],
                 rounding: ops.Rounding, seed: int) -> None:
    with safe_open(source, "pt") as file:
        names, metadata = file.keys(), file.metadata()
        held = {name: file.get_tensor(name) for name in names}
    own = [held[name].T if layer in turned else held[name] for layer, name in places.items()]
    parts: list[list[Adapter]] = [[party[layer] for party in parties if layer in party] for layer in places]
    ops.merge_many_(own, *([[getattr(a, factor) for a in part] for part in parts] for factor in ("A", "B", "scale")),
                    rounding=rounding, seed=[derive(seed, layer) for layer in places])
    save_file(held, target, metadata)


def main(arguments: list[str]) -> None:
    """The verb."""
    parser = argparse.ArgumentParser(prog="flora merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="example: flora merge smollm2-135m adapters/alice adapters/bob --weights 0.7 0.3 "
                                            "--out merged")
    parser.add_argument("base", help="a folder with config.json and safetensors, a fetched name, or a name of the hub")
    parser.add_argument("adapters", nargs="+", metavar="adapter", help="a folder that PEFT wrote; ranks and alphas may differ")
    parser.add_argument("--weights", nargs="+", type=float, metavar="P", help="p_k of each adapter, as they are (default: 1 / K)")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest", help="of 16-bit weights")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    o = parser.parse_args(arguments)
    options = {"rounding": o.rounding, "seed": o.seed, "overwrite": o.overwrite, "quiet": o.quiet}
    where = merge_files(o.base, o.adapters, o.out, o.weights, **options)
    p = o.weights or [1 / len(o.adapters)] * len(o.adapters)
    print(f"merged {len(o.adapters)} adapters, weights {' '.join(f'{one:.6g}' for one in p)}, into {where}")

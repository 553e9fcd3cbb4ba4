"""The settings of a run: one YAML file, Hugging Face's names first; an unknown key is refused with the nearest known one."""
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from flora.consistency import conflicts
from flora.errors import ConfigError
from flora.sections import (
    DeviceConfig,
    GroupsConfig,
    LimitsConfig,
    MemoryConfig,
    PartitionConfig,
    PrivacyConfig,
    SecureAggregationConfig,
    Strict,
)

OTHER_BRANCH = ("list_type", "int_type", "float_type")          # said of every branch of a union but the one that was meant
NotNegative = Annotated[int, Field(ge=0)]


class RunConfig(Strict):
    """A federated fine-tuning run. Every field is a key of the YAML file and an option of the command line."""

    model_name_or_path: str = "smollm2-135m"
    """A fetched name, a folder, a .gguf file, or a name of the hub."""
    num_hidden_layers: PositiveInt | None = None
    """Take only so many of the model's first blocks: a comparison in minutes."""
    dataset: str = "chitchat"
    """A fetched name, a .json, .jsonl, .parquet or .csv file or a folder of them, or a name of the hub."""
    partition: PartitionConfig = PartitionConfig()
    """How rows are dealt to clients."""
    groups: GroupsConfig | None = None
    """Groups of clients: count, by, label, inner_rounds, depth, rank, inner, choose."""
    fleet: tuple[DeviceConfig, ...] = ()
    """Classes of devices, on which time is simulated: name, count, seconds_per_layer_step, memory_mb, up_mbps, down_mbps, ..."""
    fleet_memory: MemoryConfig = MemoryConfig()
    """What training takes of a device's memory beside the factors."""
    backhaul_mbps: PositiveFloat | None = None
    """The link between a group's server and the server (no time where left out)."""
    round_deadline: PositiveFloat | None = None
    """Simulated seconds after which a round ends without who is late; needs a fleet."""
    over_sampling: Annotated[float, Field(ge=1)] = 1.0
    """Sample so many times the clients that fraction_train says, and end the round with the first of these; needs a fleet."""
    late: Literal["drop", "next"] = "drop"
    """Updates of who is late: left out, or taken into the next round at staleness_weight."""
    staleness_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """late next: what an update counts that is a round late."""
    min_clients: PositiveInt = 1
    """Answers without which a round is not aggregated: the model stays as it was."""
    robust: Literal["clip", "krum", "trim"] | None = None
    """Bound what a client may change by the round's median (clip), and leave out who is farthest from the others (krum) or
    points against most (trim)."""
    robust_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """krum, trim: the share of the clients that may lie."""
    robust_bound: PositiveFloat | None = None
    """robust: the bound of the Frobenius norm of what a client changes (the median of the round where left out)."""
    num_clients: PositiveInt = 8
    """Clients of the run."""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the clients that train in a round (at least one)."""
    num_rounds: PositiveInt = 3
    """Rounds."""
    strategy: str = "flora"
    """The aggregation rule: flora, fedit, zeropad, hetlora, flexlora, florist, ffa, rolora, fedex, fedsa, fedsvd, fedsb, raflora,
    centralized, standalone, full."""
    weighting: Literal["examples", "uniform", "tokens"] | PositiveFloat = "examples"
    """What a client counts: its number of training rows, the same as any other, the tokens that it trained on; or a number, the
    scaling factor of every client."""
    start: Literal["fresh", "warm", "shared"] | None = None
    """Strategy flora: where clients start: each from an adapter of its own (fresh, the default), from the best part of the
    aggregate (warm), or all from one A (shared)."""
    server_learning_rate: PositiveFloat | None = None
    """Length of the server's step from what it sent towards what came back (1 where left out)."""
    absent: Literal["zero", "renormalise"] | None = None
    """What a client without a layer counts as there (the strategy's own rule where left out)."""
    mixed_alpha: Literal["refuse", "fold"] | None = None
    """Averages of clients with different alpha / rank: refuse, or write all at one scale first."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Strategy florist: the share of Σ σ² that is kept (0.95 where left out)."""
    rank_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Strategy hetlora: the share of its ranks that a client goes on with when the others shrink (0.99 where left out)."""
    rank_penalty: Annotated[float, Field(ge=0)] | None = None
    """Strategy hetlora: weight of the penalty on the ranks that may go (5e-3 where left out)."""
    adalora: bool = False
    """Clients prune their ranks while they train, by importance (AdaLoRA); for strategies that take mixed ranks."""
    adalora_keep: Annotated[float, Field(gt=0, le=1)] | None = None
    """adalora: the share of its ranks that a client keeps, over all layers together (0.5 where left out)."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """FedProx: weight of half the squared distance of what trains from where it started."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """AdamW's moments of a client from round to round."""
    downlink: Literal["stack", "compressed", "threshold", "dense", "auto"] = "stack"
    """How updates that are merged travel down: as they are, at full rank, cut to downlink_tol, as new weights, or layer by layer
    as the cheapest of these whose error is within downlink_tol."""
    downlink_tol: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Relative error of an update that threshold and auto may make (0: none but rounding)."""
    communication_budget_mb: PositiveFloat | None = None
    """Bytes up and down, of all clients and rounds together, in 10^6: no round begins that would go beyond, if it takes what the
    largest one so far took (the first: what a dry run says)."""
    secure_aggregation: SecureAggregationConfig | None = None
    """Strategy flora: the server learns the sum of the updates and none of them: width, threshold, bits, unit, tolerance."""
    privacy: PrivacyConfig | None = None
    """Differential privacy: level (client, example), clip, noise_multiplier or epsilon, delta, rank."""
    limits: LimitsConfig | None = None
    """What a message may hold: sizes, ranks, examples."""
    lora_r: PositiveInt | list[PositiveInt] = 16
    """Rank: one for all, or a list with one a client."""
    lora_alpha: PositiveFloat | list[PositiveFloat] | Literal["r", "2r"] = "2r"
    """Alpha: one for all, a list like lora_r's, or a multiple of each client's rank. scale = alpha / rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of A."""
    target_modules: str | list[str] = "all-linear"
    """Which modules carry adapters: all-linear, or names such as q_proj v_proj."""
    learning_rate: PositiveFloat = 3e-4
    """Of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; restarts every round."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up in each round."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clips each client's gradient by its own norm; 0 turns it off."""
    max_steps: PositiveInt | None = None
    """Optimiser steps of a client in a round; leave out for num_train_epochs."""
    num_train_epochs: PositiveFloat | None = None
    """Passes over a client's rows in a round (1 where neither this nor max_steps is given)."""
    per_device_train_batch_size: PositiveInt = 4
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in an optimiser step."""
    max_tokens_per_batch: PositiveInt | Literal["auto"] = "auto"
    """Tokens that one pass of the clients that train together may hold; auto: by the device's memory, at most 1,024 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what it computed: less memory, a third more time."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the adapters while they train, and on the wire."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a sequence; longer ones lose the start of their prompt first."""
    chat_template: bool = True
    """Write rows with the tokenizer's chat template, where it has one."""
    max_examples_per_client: PositiveInt | None = None
    """Keep at most so many training rows of a client, chosen by the seed."""
    eval_rows_per_client: NotNegative = 16
    """Rows held out for each client."""
    server_eval_rows: PositiveInt = 64
    """Rows held out for the server's evaluation of the global model."""
    per_device_eval_batch_size: PositiveInt = 8
    """Sequences in an evaluation batch."""
    evaluate: list[str] | Literal["auto"] = "auto"
    """Beside loss and next-token accuracy: labels (likelihood of each label's word), answers (greedy exact match of the column
    answer), lm_eval:FOLDER (multiple choice, MMLU's parquet layout), mt_bench:FILE (answers to its questions, written out);
    auto: labels or answers where rows have such a column."""
    eval_every: PositiveInt = 1
    """Evaluate before the first round, after every so many rounds, and after the last."""
    seed: int = 0
    """Decides partition, splits, sampling, fresh adapters, order and dropout."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base; auto: float32 on a CPU, bfloat16 on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: a GPU where there is one."""
    output_dir: str = "runs/flora"
    """The run folder."""
    overwrite: bool = False
    """Replace a run that output_dir holds."""
    merge_into: Literal["base", "adapter"] = "base"
    """Where updates go: into the base weights, or into an adapter beside them (4-bit, 8-bit or shared weights)."""
    merge_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How a merge rounds 16-bit weights; stochastic is right on average, seeded."""
    merge_residual: bool = False
    """Keep what rounding left of 16-bit weights in a bf16 tensor beside each: no drift over hundreds of rounds."""
    merge_rank: PositiveInt | None = None
    """merge_into adapter: compress what is kept to so many ranks (default: the smaller side of the weight)."""
    merge_tol: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """merge_into adapter: compress what is kept to this relative error."""
    keep_rounds: NotNegative = 1
    """Keep the adapters of so many of the last rounds."""
    checkpoint_every: NotNegative = 1
    """Write what `flora resume` needs after every so many rounds; 0: never."""
    save_model: bool = True
    """Write the merged model, or the adapter beside the base, when the run is finished."""
    quiet: bool = False
    """Say nothing but errors and, at the end, the run folder."""
    report_to: Annotated[list[Literal["tensorboard", "wandb", "none"]], Field(min_length=1)] = Field(["tensorboard"])
    """Where rows go beside metrics.jsonl: tensorboard (event files in RUN/tensorboard), wandb (pip install wandb;
    WANDB_PROJECT, WANDB_MODE=offline), or none."""
    profile: bool = False
    """Trace some passes of the second round (the first, where there is no other) with torch.profiler, in RUN/profile:
    trace.json.gz for chrome://tracing or perfetto, top.txt with the operators that take most."""

    @field_validator("evaluate", "report_to", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        """A single evaluation or receiver of rows may stand without a list."""
        return [value] if isinstance(value, str) and value != "auto" else value

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        for problem in conflicts(self):
            raise ValueError(problem)
        return self

    def ranks(self) -> list[int]:
        """Every client's rank, in order."""
        return self._per_client(self.lora_r)

    def alphas(self) -> list[float]:
        """Every client's alpha, in order."""
        if isinstance(self.lora_alpha, str):
            factor = {"r": 1.0, "2r": 2.0}[self.lora_alpha]
            return [factor * rank for rank in self.ranks()]
        return self._per_client(self.lora_alpha)

    def strategy_options(self) -> dict[str, Any]:
        """The options of the strategy that are given, by the names that flora.aggregate knows."""
        given = {"start": self.start, "server_lr": self.server_learning_rate, "absent": self.absent,
                 "mixed_alpha": self.mixed_alpha, "threshold": self.threshold}
        return {name: value for name, value in given.items() if value is not None}

    def _per_client(self, value: Any) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        return values * self.num_clients if len(values) == 1 else values


def _problem(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence."""
    where = ".".join(str(part) for part in error["loc"] if isinstance(part, str) and not re.search(r"\[|^constrained-", part))
    if error["type"] == "extra_forbidden":
        nested = {name: f"partition.{name}" for name in PartitionConfig.model_fields}
        known = nested if len(error["loc"]) > 1 else {**nested, **{name: name for name in RunConfig.model_fields}}
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        return f"{where}: no such key" + (f"; did you mean {known[near[0]]}?" if near else "")
    what = error["msg"].removeprefix("Value error, ")
    return f"{where}: {what}; got {error['input']!r}" if where else what


def as_config_error(error: ValidationError, name: str) -> ConfigError:
    """Pydantic's errors as one paragraph that names every key that is unknown (with the nearest known one) or wrong."""
    errors = error.errors()
    told = {e["loc"][:1] for e in errors if e["type"] not in OTHER_BRANCH}
    problems = list(dict.fromkeys(_problem(e) for e in errors if e["type"] not in OTHER_BRANCH or e["loc"][:1] not in told))
    return ConfigError(f"{name}: " + "; ".join(problems) + ".")


def parse(settings: Mapping[str, Any], name: str = "the settings") -> RunConfig:
    """A checked config. Raises ConfigError that names every key that is unknown (with the nearest known one) or wrong."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{name}: expected keys and values; got {type(settings).__name__}")
    try:
        return RunConfig.model_validate(dict(settings))
    except ValidationError as error:
        raise as_config_error(error, name) from None


def load(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError where it is missing or is not YAML."""
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a YAML file at {path}; got {error.strerror or error}. Write one with keys such as "
                          "model_name_or_path, dataset, num_clients, lora_r.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected keys and values; got {type(settings).__name__}")
    return settings

"""The parts of a run's settings that have keys of their own: partition, groups, fleet, privacy, limits."""
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from flora.limits import Dtype, Limits


class Strict(BaseModel):
    """Settings that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, use_attribute_docstrings=True)


class PartitionConfig(Strict):
    """How rows are dealt to clients: one of by, iid, dirichlet_alpha, shards; evenly at random where none is given."""

    by: str | None = None
    """A column: one client per value, those with the most rows."""
    iid: bool = False
    """Evenly, at random."""
    dirichlet_alpha: PositiveFloat | None = None
    """Skewed labels: each label's rows in proportions drawn from a Dirichlet."""
    equal_sizes: bool = False
    """With dirichlet_alpha: as many rows for every client, of labels in shares that it draws for itself."""
    shards: PositiveInt | None = None
    """Shards of rows sorted by label, so many a client."""
    label: str | None = None
    """The column that dirichlet_alpha and shards skew."""


class GroupsConfig(Strict):
    """Groups of clients that aggregate among themselves before they answer as one (HierFedLoRA)."""

    count: PositiveInt
    """How many."""
    by: Literal["near_iid", "random", "similar"] = "near_iid"
    """Who is together: groups whose rows are distributed as everybody's, anybody, or those that are alike."""
    label: str | None = None
    """The column whose values are compared; left out: the partition's label, else hashed tokens."""
    inner_rounds: PositiveInt = 1
    """Rounds within a group for each round of the run."""
    depth: PositiveInt | None = None
    """Train only so many blocks nearest the output (all where left out)."""
    rank: PositiveInt | None = None
    """Compress a group's answer to so many ranks a layer."""
    inner: str = "flora"
    """The strategy within a group: flora, fedit, zeropad, flexlora, florist."""
    choose: bool = False
    """Choose inner_rounds and depth of every group before every round, by the fleet's clock, within round_deadline or bytes_mb."""
    bytes_mb: PositiveFloat | None = None
    """choose: bytes of a round, of all groups and clients, in 10^6."""


class DeviceConfig(Strict):
    """A class of devices of the fleet (flora.fleet.DeviceClass)."""

    name: str
    """Of the class."""
    count: PositiveInt
    """Devices of it; those of all classes together are num_clients."""
    seconds_per_layer_step: PositiveFloat
    """Of one optimiser step in one block that trains."""
    memory_mb: PositiveFloat
    """For training, in 10^6 bytes."""
    up_mbps: PositiveFloat
    """10^6 bits a second."""
    down_mbps: PositiveFloat
    """10^6 bits a second."""
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The probability that it stays for a round."""
    jitter: Annotated[float, Field(ge=0)] = 0.0
    """σ of the log-normal that multiplies its seconds."""


class MemoryConfig(Strict):
    """What training takes of a device beside the factors (flora.capacity.Memory)."""

    base_mb: Annotated[float, Field(ge=0)] = 0.0
    """The frozen base, in 10^6 bytes."""
    activation_mb: Annotated[float, Field(ge=0)] = 0.0
    """What a trained block keeps for its backward pass."""


class PrivacyConfig(Strict):
    """Differential privacy: of whole clients (noise by the server), or of each example of a client (noise by the client)."""

    level: Literal["client", "example"] = "client"
    """Whose part is hidden: client, everything that a client has; example, one row of a client."""
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The norm that a client's update, or an example's gradient, has at most."""
    noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Noise in units of clip; or give epsilon."""
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """What the whole run may cost; the noise is worked out from it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Of (epsilon, delta): well under 1 / clients, or 1 / rows of a client."""
    rank: PositiveInt | None = None
    """Strategy flora: ranks that are sent of a layer's noisy sum (left out: as many as the clients expected in a round have)."""

    @model_validator(mode="after")
    def _consistent(self) -> "PrivacyConfig":
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("privacy: expected noise_multiplier or epsilon; got " + ("both. Leave one out" if self.epsilon else
                             "neither. Give epsilon for the whole run"))
        if self.rank is not None and self.level == "example":
            raise ValueError("privacy.rank is of level client, whose noisy sum is compressed; leave it out")
        return self


class LimitsConfig(Strict):
    """What a message may be before its receiver refuses it (flora.messages.Limits)."""

    max_message_mb: PositiveFloat = Limits.max_bytes / 1e6
    """A message, in 10^6 bytes."""
    max_header_mb: PositiveFloat = Limits.max_header_bytes / 1e6
    """Its header: names, fields, the table of tensors. Reading it takes up to thirty times as much."""
    max_decoded_mb: PositiveFloat = Limits.max_decoded_bytes / 1e6
    """All its tensors, those included that the receiver makes: zeros, factors it holds, frames."""
    max_layers: PositiveInt = Limits.max_layers
    """Layers."""
    max_rank: PositiveInt = Limits.max_rank
    """The rank of a layer's adapter; of a stack that comes down, the sum over the clients."""
    max_total_rank: PositiveInt = Limits.max_total_rank
    """The sum over the layers."""
    max_examples: PositiveInt = Limits.max_examples
    """Rows that a client may claim to have trained on: its weight in the average."""
    max_metrics: Annotated[int, Field(ge=0)] = Limits.max_metrics
    """Metrics of an update."""
    max_name: PositiveInt = Limits.max_name
    """Characters in the name of a layer, client, run or metric."""
    max_frame_mb: PositiveFloat = Limits.max_frame_bytes / 1e6
    """Fixed factors that the receiver makes for the cores of a message (Fed-SB)."""
    max_frame_gmac: PositiveFloat = Limits.max_frame_work / 1e9
    """10^9 multiply-adds that making them takes; about one a second on a core."""
    dtypes: tuple[Dtype, ...] = Limits.dtypes
    """Of factors, named as safetensors does."""

    def limits(self) -> Limits:
        """These, as flora.messages.decode takes them."""
        return Limits(
            max_bytes=round(self.max_message_mb * 1e6), max_header_bytes=round(self.max_header_mb * 1e6),
            max_decoded_bytes=round(self.max_decoded_mb * 1e6), max_layers=self.max_layers, max_rank=self.max_rank,
            max_total_rank=self.max_total_rank, max_examples=self.max_examples, max_metrics=self.max_metrics,
            max_name=self.max_name, max_frame_bytes=round(self.max_frame_mb * 1e6),
            max_frame_work=round(self.max_frame_gmac * 1e9), dtypes=self.dtypes)


class SecureAggregationConfig(Strict):
    """Secure aggregation (flora.secure.SecureConfig): the server learns the sum of the updates, and none of them."""

    width: PositiveInt | None = None
    """The rank that the sum may have (left out: as many as the clients' ranks together, which is always enough)."""
    threshold: PositiveInt | None = None
    """Clients that must stay to the end of a round (left out: more than two thirds)."""
    bits: PositiveInt = 30
    """Fractional bits of the sums."""
    unit: PositiveFloat = 1.0
    """Steps are unit / 2^bits."""
    tolerance: PositiveFloat | None = 1e-3
    """Estimated relative error of a layer above which the run stops and says what to change (null: never)."""

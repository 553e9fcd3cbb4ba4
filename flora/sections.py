"""The parts of a run's settings that have keys of their own: partition, groups, fleet, privacy."""
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


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

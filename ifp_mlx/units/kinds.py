"""What a unit is: something of a model that can be kept or left out, and where its weights lie.

Everything that selects, slices, streams, stores or sizes units knows kinds; which family has which
kind where is one table (``families``). The contract of every kind: the compact model equals the
source with all other units masked.
"""

import dataclasses
from collections.abc import Mapping

ARRAYS = ("weight", "scales", "biases", "bias")
"""The arrays of a linear layer, packed or not, that have a row for each unit."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One module of a decoder layer that holds something of every unit.

    Attributes:
        path: where it is inside the layer, such as ``mlp.gate_proj``.
        axis: 0 where units are rows, which can be gathered packed, bit for bit; -1 where they are
            columns, which share the groups of a packed matrix with their neighbours.
        stacked: matrices that lie on top of each other in one: a unit is a row of each of them.
        arrays: those of the module's arrays that are indexed by unit.
    """

    path: str
    axis: int = 0
    stacked: int = 1
    arrays: tuple[str, ...] = ARRAYS


@dataclasses.dataclass(frozen=True)
class Router:
    """What decides which experts see a token: the keys of config.json that bound what can be cut.

    Attributes:
        chosen: how many experts see a token.
        groups: into how many groups of equal size the experts are divided; None if they are not.
        chosen_groups: in how many of them a token's experts may be.
    """

    chosen: str = "num_experts_per_tok"
    groups: str | None = None
    chosen_groups: str | None = None


@dataclasses.dataclass(frozen=True)
class UnitKind:
    """A kind of units, as one family has it.

    Attributes:
        name: ``ffn`` or ``expert``; goes into files.
        label: what people read, in the plural.
        parts: where the weights of a unit lie.
        config_fields: keys of config.json that say how many units there are, and so say K for a
            compact model; none where nothing but the weights says it.
        multiple: amounts are multiples of this, which kernels and quantization like.
        router: what chooses among the units for each token; None where all are always in use.
    """

    name: str
    label: str
    parts: tuple[Part, ...]
    config_fields: tuple[str, ...]
    multiple: int
    router: Router | None = None

    @property
    def rows(self) -> tuple[Part, ...]:
        """The parts in which a unit is rows."""
        return tuple(part for part in self.parts if part.axis == 0)

    @property
    def columns(self) -> Part | None:
        """The part in which a unit is a column, if this kind has one."""
        return next((part for part in self.parts if part.axis == -1), None)


@dataclasses.dataclass(frozen=True)
class UnitShape:
    """How many units of a kind a model has.

    Attributes:
        layers: indices of the decoder layers that have them, ascending.
        num_units: F, in each of those.
    """

    layers: tuple[int, ...]
    num_units: int

    def __str__(self) -> str:
        """Return what an error message says."""
        return f"{len(self.layers)} layers of {self.num_units} units"


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: one row of the table in ``families``.

    Attributes:
        model_type: as config.json says it.
        kind: the units to choose among.
        layers_path: where the list of decoder layers is, as in parameter names.
        trunk: the module that makes hidden states of token ids, without the vocabulary's logits.
        settings: the key of config.json under which the text model's settings are, where they are
            not at its top.
        config_names: keys of config.json that this family calls otherwise, by their usual name.
    """

    model_type: str
    kind: UnitKind
    layers_path: str = "model.layers"
    trunk: str = "model"
    settings: str | None = None
    config_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def array_name(self, layer: int, part: Part, array: str) -> str:
        """Return the name that a checkpoint has for an array of a part."""
        return f"{self.layers_path}.{layer}.{part.path}.{array}"

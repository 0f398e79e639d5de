"""Which units a sub-network keeps."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.selection.top_k import mask_from_indices
from ifp_mlx.storage.arrays import load_arrays, save_arrays
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.modules import family_of, num_groups, unit_shape

FORMAT_VERSION = "2"

_RANKS = ".ranks"  # what follows a kind's name in the name of an array
_FFN = "ffn"  # the only kind of files of version 1, in all layers of the model


@dataclasses.dataclass(frozen=True)
class Pick:
    """What is kept of one kind of units.

    Attributes:
        kind: the name of the kind.
        layers: indices of the decoder layers that have such units, ascending.
        indices: (L, K) int32, a row for each of ``layers``; ascending and unique in it, each in
            [0, F).
        num_units: F of the source.
        ranks: (L, F) uint8, where each unit's score stands among those of its layer, in 256 steps,
            0 the lowest; None where no scores are known.
    """

    kind: str
    layers: tuple[int, ...]
    indices: mx.array
    num_units: int
    ranks: mx.array | None = None

    @property
    def num_kept_units(self) -> int:
        """K."""
        return int(self.indices.shape[1])

    @property
    def shape(self) -> UnitShape:
        """The units of the source."""
        return UnitShape(self.layers, self.num_units)

    def units(self, position: int) -> mx.array:
        """Return the (K,) kept units of the layer at a position in ``layers``. Lazy, and a view.

        A slice, because mlx does what ``indices[position]`` says with a gather: on an accelerator
        one more kernel a layer, a quarter of all that slicing launches.
        """
        return self.indices[position : position + 1].squeeze(0)

    def mask(self) -> mx.array:
        """Return the (L, F) float32 mask of the kept units."""
        return mask_from_indices(self.indices, self.num_units)

    def validate(self) -> None:
        """Check everything that ``mx.take`` does not. Evaluates.

        Raises:
            SelectionError: wrong rank or dtype, out of range, unsorted or repeated.
        """
        indices = self.indices
        if indices.ndim != 2 or indices.dtype != mx.int32 or 0 in indices.shape:
            raise SelectionError(
                f"a selection is (layers, units) int32, not {indices.shape} {indices.dtype}"
            )
        if len(self.layers) != indices.shape[0] or list(self.layers) != sorted(set(self.layers)):
            raise SelectionError(
                f"a selection of {indices.shape[0]} layers names layers {self.layers}"
            )
        outside = ((indices < 0) | (indices >= self.num_units)).any()
        repeated = (indices[:, 1:] <= indices[:, :-1]).any()
        mx.eval(outside, repeated)  # together: the host waits for the device once
        if outside.item():
            raise SelectionError(f"a selected unit is outside 0..{self.num_units - 1}")
        if repeated.item():
            raise SelectionError("selected units must be ascending and unique in each layer")
        if self.ranks is not None:
            shape = (len(self.layers), self.num_units)
            if self.ranks.shape != shape or self.ranks.dtype != mx.uint8:
                raise SelectionError(
                    f"the ranks of units are {shape} uint8, not {self.ranks.shape} "
                    f"{self.ranks.dtype}"
                )

    def check_groups(self, num_groups: int) -> None:
        """Check that as many units are kept in each of some groups of equal size. Evaluates.

        Raises:
            SelectionError: they are not.
        """
        if num_groups == 1:
            return
        if self.num_kept_units % num_groups == 0:
            grouped = self.indices.reshape(len(self.layers), num_groups, -1)
            groups = grouped // (self.num_units // num_groups)
            if (groups == mx.arange(num_groups)[:, None]).all().item():
                return
        raise SelectionError(f"the router needs as many units in each of its {num_groups} groups")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The units that a sub-network keeps, and what chose them.

    Attributes:
        picks: one for each kind that is chosen among.
        selector: what chose.
    """

    picks: tuple[Pick, ...]
    selector: SelectorSpec

    @property
    def pick(self) -> Pick:
        """The one pick: every family of today is cut in units of one kind."""
        (pick,) = self.picks
        return pick

    @property
    def num_kept_units(self) -> int:
        """K."""
        return self.pick.num_kept_units

    @property
    def num_units(self) -> int:
        """F of the source."""
        return self.pick.num_units

    def validate(self, model: nn.Module | None = None) -> "Selection":
        """Return self after checking everything that ``mx.take`` does not. Evaluates.

        Args:
            model: the source that the selection is meant for, if it is at hand.

        Raises:
            SelectionError: a pick is not valid, or made for a model of another shape.
        """
        for pick in self.picks:
            pick.validate()
        if model is not None:
            self.check_shape(family_of(model).kind.name, unit_shape(model))
            self.pick.check_groups(num_groups(model))
        return self

    def check_shape(self, kind: str, shape: UnitShape) -> None:
        """Check that the selection is for a model with these units.

        Raises:
            SelectionError: it is not.
        """
        pick = self.pick
        if (pick.kind, pick.shape) != (kind, shape):
            raise SelectionError(f"the selection is for {pick.shape}, the model has {shape}")

    def overlap(self, other: "Selection") -> mx.array:
        """Return the (L,) share of kept units that both have: shared / K of the smaller one.

        Raises:
            SelectionError: the two are for models of different shape.
        """
        one, two = self.pick, other.pick
        if (one.kind, one.shape) != (two.kind, two.shape):
            raise SelectionError("only selections of models of one shape can be compared")
        shared = (one.mask() * two.mask()).sum(axis=-1)
        return shared / min(one.num_kept_units, two.num_kept_units)

    def mean_overlap(self, other: "Selection") -> float:
        """Return the mean over layers of ``overlap``. Evaluates."""
        return cast(float, self.overlap(other).mean().item())

    @property
    def digest(self) -> str:
        """A name for the kept units: 32 hexadecimal digits. Evaluates."""
        digest = hashlib.sha256()
        for pick in self.picks:
            digest.update(json.dumps([pick.kind, pick.layers, pick.num_units]).encode())
            digest.update(np.asarray(pick.indices).tobytes())
        return digest.hexdigest()[:32]

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all; ``metadata`` goes into its header."""
        header = {
            **(metadata or {}),
            "selection_version": FORMAT_VERSION,
            "selector": str(self.selector),
            "picks": json.dumps(
                [[pick.kind, list(pick.layers), pick.num_units] for pick in self.picks]
            ),
        }
        arrays = {pick.kind: pick.indices for pick in self.picks}
        arrays |= {pick.kind + _RANKS: pick.ranks for pick in self.picks if pick.ranks is not None}
        save_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: Path) -> tuple["Selection", dict[str, str]]:
        """Return a selection and the metadata it was saved with, validated. Evaluates.

        Raises:
            SelectionError: the file is damaged or is no selection.
        """
        try:
            arrays, metadata = load_arrays(path)
            if "picks" not in metadata:  # version 1
                indices = arrays["indices"]
                layers = tuple(range(indices.shape[0]))
                picks = [Pick(_FFN, layers, indices, int(metadata["num_units"]))]
            else:
                picks = [
                    Pick(
                        str(kind),
                        tuple(map(int, layers)),
                        arrays[kind],
                        int(num_units),
                        arrays.get(f"{kind}{_RANKS}"),
                    )
                    for kind, layers, num_units in json.loads(metadata["picks"])
                ]
            selection = cls(tuple(picks), SelectorSpec.parse(metadata["selector"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SelectionError(f"{path} is not a selection file: {error}") from error
        return selection.validate(), metadata

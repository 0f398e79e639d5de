"""Slicing: a Selection and a dense model or mixture, its routers included, make a compact model.

The compact model is the same mlx-lm class with K units. Everything that holds no units is the
dense model's own, shared and not copied, so many sub-networks of one model cost their slices and
one of everything else.

Packed checkpoints: rows are gathered packed, bit for bit. Columns cut across the quantization
groups of their matrix, so they are taken apart and packed again (``repacking``), whose error is
measured. Where exactness is asked for, they are kept as plain weights, or the packed matrix stays
whole (``whole_down``), whichever is smaller; whole it stays too where packing again at 8 bits would
make a sub-network larger than its source.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.gather import take_columns, take_rows
from ifp_mlx.slicing.repacking import (
    MOST_BITS,
    Repacking,
    RequantizationError,
    pack_again,
    repacking_for,
)
from ifp_mlx.slicing.whole_down import WholeDown, is_smaller_whole
from ifp_mlx.units.changed_linear import ChangedLinear
from ifp_mlx.units.kinds import Part
from ifp_mlx.units.modules import (
    clone_module,
    compute_dtype,
    copy_module,
    dequantized,
    family_of,
    is_packed,
    part_of,
    plain_linear,
    replace_part,
    stored_bytes,
    unit_layers,
    unit_shape,
    with_own_parts,
    with_parts,
)

DEFAULT_CONTEXT_TOKENS = 4096
"""The length of conversation that memory is predicted for."""


@dataclasses.dataclass(frozen=True)
class CutOptions:
    """How sub-networks are cut from a model, and what it is allowed to take.

    Attributes:
        exact_down: pack nothing again: keep columns of packed down projections as plain weights, or
            the packed projection whole where that is smaller.
        as_stored: cut from the checkpoint as it is stored, whatever type is computed in, to a model
            that mlx-lm can build: for writing it.
        context_tokens: the length of conversation that memory must be enough for.
        memory_bytes: the most that may be used; None is what the machine has.
        force: load what is predicted not to fit in memory.
    """

    exact_down: bool = False
    as_stored: bool = False
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    memory_bytes: int | None = None
    force: bool = False


DEFAULT_CUT = CutOptions()


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """How large a model is, in the type that it computes in.

    Attributes:
        parameters: their number.
        num_bytes: of its weights.
    """

    parameters: int
    num_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """Return the size of a model. Evaluates nothing."""
        from mlx_lm.utils import get_total_parameters

        return cls(int(get_total_parameters(model)), stored_bytes(model))


@dataclasses.dataclass(frozen=True)
class CutModel:
    """A compact model and what making it took.

    Attributes:
        model: evaluated.
        source: the model that it was cut from.
        requantization_error: relative error of packing weights again, 0 where none were.
        seconds: what cutting or reading it took.
        is_stored: it was read whole, as an earlier run had cut it.
        unit_bytes_read: bytes of units read from the disk; None where they were in memory, or the
            checkpoint's form did not allow to read parts of it.
        used_unit_file: they were read from the unit file.
        stored: the same in the precision of its source, for keeping it; None where it cannot have
            that without being rounded once more.
    """

    model: nn.Module
    source: ModelSize
    requantization_error: float = 0.0
    seconds: float = 0.0
    is_stored: bool = False
    unit_bytes_read: int | None = None
    used_unit_file: bool = False
    stored: nn.Module | None = None


class UnitSource(Protocol):
    """Where units come from: a model in memory or a checkpoint on disk."""

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        """Return what a part of a layer has of the given (K,) int32 units, by array name.

        Rows come as they are stored, packed if they are packed. Columns come as one plain
        (D, K) ``weight``.
        """

    def whole(self, layer: int, part: Part) -> nn.Module:
        """Return the module of a part as it is stored."""


class ResidentUnits:
    """The units of a model in memory. Lazy."""

    def __init__(self, model: nn.Module):
        self._layers = unit_layers(model)
        self._num_units = unit_shape(model).num_units
        self._dtype = compute_dtype(model)

    def take(self, layer: int, part: Part, units: mx.array) -> dict[str, mx.array]:
        """Return what a part of a layer has of the given units."""
        module = self.whole(layer, part)
        if part.axis == -1:
            return {"weight": take_columns(dequantized(module, self._dtype), units)}
        rows = rows_of(part, units, self._num_units)
        return {
            name: take_rows(module[name], rows)
            for name in part.arrays
            if module.get(name) is not None
        }

    def whole(self, layer: int, part: Part) -> nn.Module:
        """Return the module of a part."""
        return part_of(self._layers[layer], part)


def slice_model(
    model: nn.Module,
    selection: Selection,
    options: CutOptions = DEFAULT_CUT,
    error: RequantizationError | None = None,
    repacking: Repacking | None = None,
) -> nn.Module:
    """Return the compact model that keeps the selected units.

    It equals the dense model with all other units masked: exactly in real arithmetic for plain
    weights; of packed ones rows are gathered bit for bit; columns are packed again, and so is what
    an adapter changed.

    Args:
        model: the dense mlx-lm model; it is not changed.
        selection: which units; validated against the model before anything is gathered, because
            ``mx.take`` reads out of range without complaint.
        options: how packed columns are kept.
        error: counts what is packed again.
        repacking: how that is packed; None is as the model's size allows.

    Returns:
        A new model of the same class. Lazy: evaluate its parameters to do the gathers.

    Raises:
        SelectionError: the selection does not fit the model.
    """
    selection.validate(model)
    compact = compact_skeleton(model, selection)
    for _ in fill_layers(compact, selection, ResidentUnits(model), options, error, repacking):
        pass
    return compact


def compact_skeleton(model: nn.Module, selection: Selection) -> nn.Module:
    """Return a copy of ``model`` that says it has K units, whose parts can be replaced."""
    compact = with_own_parts(model)
    family = family_of(model)
    amounts = dict.fromkeys(family.kind.config_fields, selection.num_kept_units)
    changes: dict[str, Any] = dict(amounts)
    if family.settings is not None:
        changes = {family.settings: {**getattr(model.args, family.settings), **amounts}}
    known = {name: value for name, value in changes.items() if hasattr(model.args, name)}
    compact.args = dataclasses.replace(model.args, **known)
    return compact


def fill_layers(
    compact: nn.Module,
    selection: Selection,
    source: UnitSource,
    options: CutOptions = DEFAULT_CUT,
    error: RequantizationError | None = None,
    repacking: Repacking | None = None,
) -> Iterator[int]:
    """Fill a ``compact_skeleton`` with the selected units; yield each layer that is done. Lazy.

    Args:
        compact: changed in place, layer by layer.
        selection: validated.
        source: where the units come from.
        options: as in ``slice_model``.
        error: as in ``slice_model``.
        repacking: as in ``slice_model``.
    """
    kind, pick = family_of(compact).kind, selection.pick
    dtype = compute_dtype(compact)
    if repacking is None:
        repacking = repacking_for(compact, pick.num_kept_units)
    may_stay_whole = options.exact_down or (not options.as_stored and repacking.bits < MOST_BITS)
    for position, (index, layer) in enumerate(unit_layers(compact).items()):
        for part in kind.parts:
            module = part_of(layer, part)
            if part.axis == 0:
                cut = _with_arrays(module, source.take(index, part, pick.units(position)))
                if isinstance(module, ChangedLinear) and not options.exact_down:
                    cut = pack_again(cut, module.group_size, repacking, error)
            elif may_stay_whole and is_smaller_whole(module, pick.num_kept_units, dtype):
                cut = WholeDown(copy_module(source.whole(index, part)), pick.units(position))
            else:
                columns = source.take(index, part, pick.units(position))["weight"]
                cut = plain_linear(columns, module.get("bias"))
                can_be_packed = is_packed(module) or isinstance(module, ChangedLinear)
                if can_be_packed and not options.exact_down:
                    cut = pack_again(cut, int(module.group_size), repacking, error)
            replace_part(layer, part, cut)
        yield index


def rows_of(part: Part, units: mx.array, num_units: int) -> mx.array:
    """Return which rows of a part's arrays some units are: (K,), or K of each stacked matrix."""
    if part.stacked == 1:
        return units
    return mx.concatenate([units + matrix * num_units for matrix in range(part.stacked)])


def slice_rows(linear: nn.Module, rows: mx.array) -> nn.Module:
    """Return a linear layer with the given output rows: bit-exact, packed weights stay packed."""
    part = Part("")
    arrays = {name: linear[name] for name in part.arrays if linear.get(name) is not None}
    return _with_arrays(linear, {name: take_rows(array, rows) for name, array in arrays.items()})


def with_cut_downs(model: nn.Module) -> nn.Module:
    """Return a copy of a compact model, sharing its arrays, in which no down projection is whole.

    That is an ordinary model of K units a layer; kept columns are plain weights in it. Lazy.
    """
    part = family_of(model).kind.columns
    if part is None:
        copy: nn.Module = clone_module(model)
        return copy
    dtype = compute_dtype(model)

    def cut(_: int, down: nn.Module) -> nn.Module:
        if not isinstance(down, WholeDown):
            return down
        columns = take_columns(dequantized(down.down, dtype), down.units)  # (D, F) -> (D, K)
        return plain_linear(columns, down.down.get("bias"))

    return with_parts(model, part, cut)


def _with_arrays(module: nn.Module, arrays: dict[str, mx.array]) -> nn.Module:
    cut = copy_module(module)
    for name, array in arrays.items():
        cut[name] = array
    return cut

"""The two forms of a compact model: as its source is stored, and as it is computed with.

On a GPU they are one. On a CPU, where only float32 is fast, weights are unpacked and cast; what is
kept on disk or written for others still takes no more than its source does.
"""

from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ifp_mlx.units.modules import (
    clone_module,
    family_of,
    named_arrays,
    packed_leaves,
    part_of,
    replace_part,
    unit_layers,
    with_own_parts,
)


def as_computed(
    model: nn.Module, dtype: mx.Dtype | None, like: nn.Module | None = None
) -> nn.Module:
    """Return a model in the type to compute in, unpacked. Lazy.

    Args:
        model: as it is stored; it is not changed.
        dtype: the type; None computes as it is stored.
        like: a model in that form which has the same modules outside its units: they are shared.
    """
    from mlx_lm.utils import dequantize_model

    if dtype is None:
        return model
    computed = dequantize_model(clone_module(model))
    computed.set_dtype(dtype)
    if like is None:
        return computed
    shared = with_own_parts(like)
    shared.args = model.args
    parts = family_of(model).kind.parts
    for index, layer in unit_layers(computed).items():
        for part in parts:
            replace_part(shared.layers[index], part, part_of(layer, part))
    return shared


def in_types_of(model: nn.Module, stored: nn.Module) -> nn.Module | None:
    """Return a compact model in the types that its source is stored in. Lazy.

    Args:
        model: cut from the source in a wider type, and not rounded since.
        stored: the source; nothing of it is evaluated.

    Returns:
        A copy, with the same values; None where the source is packed, which the units are no more.
    """
    if packed_leaves(stored):
        return None
    types = {name: array.dtype for name, array in named_arrays(stored).items()}
    copy = cast(nn.Module, clone_module(model))
    arrays = [(name, array.astype(types[name])) for name, array in named_arrays(model).items()]
    copy.update(tree_unflatten(arrays))
    return copy

"""The modules of an mlx-lm model as units see them: found by path, copied, read as arrays."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.errors import ArchitectureError
from ifp_mlx.units.families import find_family
from ifp_mlx.units.kinds import Family, Part, UnitShape


def family_of(model: nn.Module) -> Family:
    """Return the family of an mlx-lm model.

    Raises:
        ArchitectureError: it is not in the table.
    """
    return find_family(model.args.model_type)


def module_at(module: Any, path: str) -> Any:
    """Return the module, list or array at a dotted path below a module; the module for ``""``.

    Raises:
        KeyError: there is none.
    """
    for name in path.split(".") if path else ():
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module


def trunk(model: nn.Module) -> nn.Module:
    """Return the part of an mlx-lm model that makes hidden states, without the logits."""
    return cast(nn.Module, module_at(model, family_of(model).trunk))


def unit_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the decoder layers of an mlx-lm model that have units, by their index."""
    first = family_of(model).kind.parts[0]
    return {
        index: layer for index, layer in enumerate(model.layers) if _has_module(layer, first.path)
    }


def unit_shape(model: nn.Module) -> UnitShape:
    """Return how many units an mlx-lm model has; counted in the weights, whatever its config says.

    Raises:
        ArchitectureError: the family is not in the table, or has no such units in this model.
    """
    family = family_of(model)
    first, layers = family.kind.parts[0], unit_layers(model)
    if not layers:
        raise ArchitectureError(f"this {family.model_type} model has no {family.kind.label}")
    weight = module_at(next(iter(layers.values())), first.path).weight
    return UnitShape(tuple(layers), int(weight.shape[0]) // first.stacked)


def num_groups(model: nn.Module) -> int:
    """Return into how many groups of equal size the units are divided; 1 for none.

    A router with groups needs as many units in each.
    """
    router = family_of(model).kind.router
    if router is None or router.groups is None:
        return 1
    return int(getattr(model.args, router.groups, None) or 1)


def part_of(layer: nn.Module, part: Part) -> nn.Module:
    """Return the module of a decoder layer that a part names."""
    return cast(nn.Module, module_at(layer, part.path))


def replace_part(layer: nn.Module, part: Part, module: nn.Module) -> None:
    """Put another module where a part of a decoder layer was."""
    parent, _, name = part.path.rpartition(".")
    module_at(layer, parent)[name] = module


def part_arrays(layer: nn.Module, part: Part) -> dict[str, mx.array]:
    """Return what belongs to a part of a decoder layer, by name inside its module."""
    module = part_of(layer, part)
    if part.axis == -1:  # the whole module, whatever has taken its place
        return named_arrays(module)
    return {name: module[name] for name in part.arrays if module.get(name) is not None}


def unit_arrays(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters that belong to units: of a compact model, what is its own."""
    family = family_of(model)
    return {
        family.array_name(index, part, name): array
        for index, layer in unit_layers(model).items()
        for part in family.kind.parts
        for name, array in part_arrays(layer, part).items()
    }


def is_packed(module: nn.Module) -> bool:
    """Return whether a layer holds packed (quantized) weights: a matrix, or a stack of them."""
    return "scales" in module and hasattr(module, "bits")


def packing_of(module: nn.Module) -> dict[str, Any]:
    """Return group size, bits and mode of a packed layer."""
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def packed_leaves(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return how each packed layer of a model is packed, by its dotted name."""
    return {name: packing_of(module) for name, module in leaf_modules(model) if is_packed(module)}


def leaf_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules without children, with their dotted names."""
    return cast(
        list[tuple[str, nn.Module]],
        tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module),
    )


def named_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return every parameter of a module tree by its dotted name."""
    return cast(dict[str, mx.array], dict(tree_flatten(module.parameters())))


def stored_bytes(module: nn.Module) -> int:
    """Return what the parameters of a module take as they are."""
    return sum(array.nbytes for array in named_arrays(module).values())


def input_dims(linear: nn.Module) -> int:
    """Return the input width of a linear layer, packed or not."""
    columns = int(linear.weight.shape[-1])
    return columns * 32 // int(linear.bits) if is_packed(linear) else columns


def dense_weight(linear: nn.Module) -> mx.array:
    """Return the (out, in) weight of a linear layer, dequantized if it is packed. Lazy."""
    if is_packed(linear):
        return mx.dequantize(
            linear.weight, linear.scales, linear.get("biases"), **packing_of(linear)
        )
    weight: mx.array = linear.weight
    return weight


def dequantized(linear: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Return the (out, in) weight of a linear layer: plain ones as they are, packed ones in dtype.

    Scales are cast first, so that a float32 result is not rounded to the type they are stored in:
    ``quantized_matmul`` with float32 activations does the same.
    """
    if not is_packed(linear):
        return dense_weight(linear)
    wide = copy_module(linear)
    if linear.mode == "affine":
        for name in ("scales", "biases"):
            wide[name] = linear[name].astype(dtype)
    return dense_weight(wide).astype(dtype)


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the floating type that a model computes in: that of its first layer's norms."""
    # Parameters alone: a scaled rotary embedding keeps a float32 vector of frequencies beside them.
    arrays = named_arrays(model.layers[0]).values()
    vectors = [a for a in arrays if a.ndim == 1 and mx.issubdtype(a.dtype, mx.floating)]
    return vectors[0].dtype


def plain_linear(weight: mx.array, bias: mx.array | None = None) -> nn.Linear:
    """Return a linear layer of an (out, in) weight, without drawing random weights first."""
    linear: nn.Linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def copy_module(module: nn.Module) -> nn.Module:
    """Return a module of its own with the same children and arrays."""
    copy: nn.Module = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)  # nn.Module means something else by ``update``
    return copy


def clone_module(module: Any) -> Any:
    """Return a structural copy of a module tree that shares every array with the original.

    Modules and containers are new, so layers can be replaced in the copy; arrays are the same
    objects, so the copy costs no memory.
    """
    if isinstance(module, nn.Module):
        copy = copy_module(module)
        for name, child in module.items():
            if isinstance(child, dict | list):  # a module is a dict
                dict.__setitem__(copy, name, clone_module(child))
        return copy
    if isinstance(module, list):
        return [clone_module(child) for child in module]
    if isinstance(module, dict):
        return {name: clone_module(child) for name, child in module.items()}
    return module


def with_own_parts(model: nn.Module) -> nn.Module:
    """Return a copy of an mlx-lm model whose parts with units can be replaced.

    New are the modules that lead to a part; attention, norms and all other modules are the
    original's own, so nothing but parts may be changed in the copy. That makes it a tenth of the
    work of ``clone_module``, which counts where a sub-network is cut for each prompt.
    """
    family = family_of(model)
    parents = [part.path.rpartition(".")[0] for part in family.kind.parts]
    holder_path, _, name = family.layers_path.rpartition(".")
    copy = _with_own(model, [holder_path])
    layers = list(model.layers)
    for index, layer in unit_layers(model).items():
        layers[index] = _with_own(layer, parents)
    module_at(copy, holder_path)[name] = layers
    return copy


def with_parts(
    model: nn.Module, part: Part, replace: Callable[[int, nn.Module], nn.Module]
) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, with one part of each layer replaced.

    Args:
        model: an mlx-lm model; it is not changed.
        part: of the family's kind.
        replace: called with (position among the layers that have units, module).
    """
    copy: nn.Module = clone_module(model)
    for position, layer in enumerate(unit_layers(copy).values()):
        replace_part(layer, part, replace(position, part_of(layer, part)))
    return copy


def _with_own(module: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Return a copy of a module in which it and the modules on the way to some paths are new."""
    copy = copy_module(module)
    below: dict[str, list[str]] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        if name:
            below.setdefault(name, []).append(rest)
    for name, rests in below.items():
        copy[name] = _with_own(module[name], rests)
    return copy


def _has_module(layer: nn.Module, path: str) -> bool:
    try:
        module_at(layer, path)
    except KeyError:
        return False
    return True

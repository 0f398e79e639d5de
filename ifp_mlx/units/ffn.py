"""Where a model family keeps its FFN units, and how to reach their activations.

Every family ends its FFN in one linear layer (*down*) whose input is the activation of the
units, one column each. So a mask over units is a factor in front of ``down``, and measuring
units is looking at what goes into it: both work for every family without knowing its
activation function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.errors import ArchitectureError, SelectionError


@dataclasses.dataclass(frozen=True)
class FFNLayout:
    """Names inside one family's FFN module.

    Attributes:
        row_projections: linear layers with one output row a unit.
        down: the linear layer with one input column a unit.
        fused: gate and up are stacked in one matrix, so unit ``i`` is rows ``i`` and ``F + i``.
        layers_path: where the list of decoder layers is, as in parameter names.
        ffn: the FFN module's name inside a decoder layer.
    """

    row_projections: tuple[str, ...]
    down: str
    fused: bool = False
    layers_path: str = "model.layers"
    ffn: str = "mlp"


_GATED = FFNLayout(("gate_proj", "up_proj"), "down_proj")
_FUSED = FFNLayout(("gate_up_proj",), "down_proj", fused=True)

# model_type in config.json -> layout. Read from the model files of mlx-lm 0.32.
FAMILIES: dict[str, FFNLayout] = {
    "llama": _GATED,  # also SmolLM and SmolLM2
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "olmo2": _GATED,
    "granite": _GATED,
    "smollm3": _GATED,
    "cohere": _GATED,
    "stablelm": _GATED,
    "phi3": _FUSED,
    "glm4": _FUSED,
    "starcoder2": FFNLayout(("c_fc",), "c_proj"),
    "gpt2": FFNLayout(("c_fc",), "c_proj", layers_path="model.h"),
    "phi": FFNLayout(("fc1",), "fc2"),
}


def ffn_layout(model_type: str) -> FFNLayout:
    """Return the FFN layout of a family.

    Raises:
        ArchitectureError: the family is not in the table (mixture-of-experts models among them).
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ArchitectureError(
            f"model_type {model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        ) from None


def ffn_shape(config: dict[str, Any]) -> tuple[int, int]:
    """Return (L, F) as a checked config.json says it."""
    if config["model_type"] == "gpt2":  # which has no field for its width
        return int(config["n_layer"]), 4 * int(config["n_embd"])
    return int(config["num_hidden_layers"]), int(config["intermediate_size"])


def ffn_modules(model: nn.Module) -> list[nn.Module]:
    """Return the FFN module of each decoder layer of an mlx-lm model, first layer first."""
    layout = ffn_layout(model.args.model_type)
    return [layer[layout.ffn] for layer in model.layers]


def ffn_arrays(model: nn.Module) -> list[mx.array]:
    """Return the parameters of the FFNs of an mlx-lm model: of a compact model, what is its own."""
    return [array for ffn in ffn_modules(model) for array in named_arrays(ffn).values()]


def num_units(model: nn.Module) -> int:
    """Return F, the number of FFN units in each layer of an mlx-lm model."""
    down = ffn_modules(model)[0][ffn_layout(model.args.model_type).down]
    return linear_input_dims(down)


def linear_input_dims(linear: nn.Module) -> int:
    """Return the input width of a linear layer, quantized or not."""
    if isinstance(linear, nn.QuantizedLinear):
        return int(linear.weight.shape[-1]) * 32 // int(linear.bits)
    return int(linear.weight.shape[-1])


def named_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return every parameter of a module tree by its dotted name."""
    return cast(dict[str, mx.array], dict(tree_flatten(module.parameters())))


def dense_weight(linear: nn.Module) -> mx.array:
    """Return the (out, in) weight of a linear layer, dequantized if it is quantized. Lazy."""
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    weight: mx.array = linear.weight
    return weight


def plain_linear(weight: mx.array, bias: mx.array | None = None) -> nn.Linear:
    """Return a linear layer of an (out, in) weight, without drawing random weights first."""
    linear: nn.Linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def clone_module(module: Any) -> Any:
    """Return a structural copy of a module tree that shares every array with the original.

    Modules and containers are new, so layers can be replaced in the copy; arrays are the same
    objects, so the copy costs no memory.
    """
    if isinstance(module, nn.Module):
        copy = _copy_module(module)
        for name, child in module.items():
            if isinstance(child, dict | list):  # a module is a dict
                dict.__setitem__(copy, name, clone_module(child))
        return copy
    if isinstance(module, list):
        return [clone_module(child) for child in module]
    if isinstance(module, dict):
        return {name: clone_module(child) for name, child in module.items()}
    return module


def with_own_ffns(model: nn.Module) -> nn.Module:
    """Return a copy of an mlx-lm model whose FFN modules can be filled anew.

    New are the FFN modules and what leads to them; attention, norms and all other modules are
    the original's own, so nothing but FFNs may be changed in the copy. That makes it a tenth of
    the work of ``clone_module``, which counts where a sub-network is cut for each prompt.
    """
    layout = ffn_layout(model.args.model_type)
    copy = parent = _copy_module(model)
    *path, layers_name = layout.layers_path.split(".")
    for name in path:
        parent[name] = _copy_module(parent[name])
        parent = parent[name]
    layers = [_copy_module(layer) for layer in parent[layers_name]]
    for layer in layers:
        layer[layout.ffn] = _copy_module(layer[layout.ffn])
    parent[layers_name] = layers
    return copy


def _copy_module(module: nn.Module) -> nn.Module:
    """Return a module of its own with the same children and arrays."""
    copy: nn.Module = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)  # nn.Module means something else by ``update``
    return copy


class MaskedDown(nn.Module):
    """A down projection behind a mask over its input, the unit activations.

    ``mask`` is (F,) for every sample alike or (B, F) for one mask a sample; None is no mask.
    It is state of a forward pass, not a parameter: it is neither saved nor trained.
    """

    def __init__(self, down: nn.Module):
        super().__init__()
        self.down = down
        self._mask: mx.array | None = None

    def __call__(self, activations: mx.array) -> mx.array:
        """Map (B, T, F) unit activations to (B, T, D)."""
        mask = self._mask
        if mask is not None:
            mask = mask.astype(activations.dtype)
            activations = activations * (mask if mask.ndim == 1 else mask[:, None, :])
        return self.down(activations)  # type: ignore[no-any-return]


class ObservedDown(nn.Module):
    """A down projection that shows its input, the (B, T, F) unit activations, to a function."""

    def __init__(self, down: nn.Module, observe: Callable[[mx.array], None]):
        super().__init__()
        self.down = down
        self._observe = observe

    def __call__(self, activations: mx.array) -> mx.array:
        """Map (B, T, F) unit activations to (B, T, D)."""
        self._observe(activations)
        return self.down(activations)  # type: ignore[no-any-return]


def with_wrapped_down(model: nn.Module, wrap: Callable[[int, nn.Module], nn.Module]) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, with each down projection wrapped.

    Args:
        model: an mlx-lm model of a family in the table; it is not changed.
        wrap: called with (layer index, down projection); returns what takes its place.
    """
    down = ffn_layout(model.args.model_type).down
    copy: nn.Module = clone_module(model)
    for index, ffn in enumerate(ffn_modules(copy)):
        ffn[down] = wrap(index, ffn[down])
    return copy


def with_unit_masks(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, sharing its arrays, whose FFN units can be masked."""
    return with_wrapped_down(model, lambda _, down: MaskedDown(down))


def set_unit_masks(model: nn.Module, masks: mx.array | None) -> None:
    """Set the masks of a model made by ``with_unit_masks``.

    Args:
        model: changed in place.
        masks: (L, F) for every sample alike, (B, L, F) for one mask a sample, or None for none.

    Raises:
        SelectionError: the masks do not have one row a layer.
    """
    ffns = ffn_modules(model)
    down = ffn_layout(model.args.model_type).down
    if masks is not None and masks.shape[-2] != len(ffns):
        raise SelectionError(f"masks have {masks.shape[-2]} layers, the model has {len(ffns)}")
    for index, ffn in enumerate(ffns):
        ffn[down]._mask = None if masks is None else masks[..., index, :]

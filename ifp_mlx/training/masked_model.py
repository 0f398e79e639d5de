"""The model in training: plain weights in, logits behind masks out."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ifp_mlx.errors import TrainingError
from ifp_mlx.training.config import TrainingConfig
from ifp_mlx.training.optimizer import FlatLayout, trainable
from ifp_mlx.units.masks import MaskedDown, down_part, set_unit_masks, with_unit_masks
from ifp_mlx.units.modules import clone_module, module_at, unit_layers


class MaskedModel:
    """A model whose trainable weights and masks are set for each pass.

    Attributes:
        module: the mlx-lm model, in the compute dtype, with maskable FFN units.
        layout: the trainable tensors.
        dtype: of the computation.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig):
        self.dtype = training_dtype(config)
        self._base = model
        self._lora_scale = config.lora.scale
        module = clone_module(model)
        if config.lora.rank:
            _add_lora(module, config)
        else:
            module.unfreeze()
            module.model[_embedding_name(module)].freeze()
            if "lm_head" in module:
                module.lm_head.freeze()
        # Collected before the cast and before the masks change the names.
        parameters = trainable(module)
        if not parameters:
            raise TrainingError("nothing is left to train in this model")
        self._plain_layout = FlatLayout.of(parameters)
        self.initial = self._plain_layout.flatten(
            [parameters[name] for name in self._plain_layout.names]
        )
        module.set_dtype(self.dtype)
        self.module = with_unit_masks(module) if config.mask != "none" else module
        down = down_part(model).path
        masked_names = tuple(
            _masked_name(name, down) if config.mask != "none" else name
            for name in self._plain_layout.names
        )
        self.layout = FlatLayout(masked_names, self._plain_layout.shapes)
        if config.gradient_checkpointing:
            _checkpoint_ffn(self.module)

    def set(self, tensors: list[mx.array], masks: mx.array | None) -> nn.Module:
        """Put weights (in the layout's order) and masks in place; return the module."""
        self.layout.install(self.module, tensors)
        if masks is not None:
            set_unit_masks(self.module, masks)
        return self.module

    def cast(self, weights: mx.array) -> list[mx.array]:
        """Return the tensors of flat master weights in the compute dtype."""
        return self.layout.split(weights.astype(self.dtype))

    def plain_weights(self, weights: mx.array) -> dict[str, mx.array]:
        """Return name -> float32 tensor, named as in the base model.

        Low-rank factors are multiplied out and added to the weight that they belong to.
        """
        named = self._plain_layout.named(weights)
        base = dict(tree_flatten(self._base.parameters()))
        plain: dict[str, mx.array] = {}
        for name, tensor in named.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == "lora_a":
                change = self._lora_scale * (tensor @ named[f"{layer}.lora_b"]).T
                plain[f"{layer}.weight"] = base[f"{layer}.weight"].astype(mx.float32) + change
            elif leaf != "lora_b":
                plain[name] = tensor
        return plain


def training_dtype(config: TrainingConfig) -> mx.Dtype:
    """Return the type that a run computes in, by its configuration and the default device."""
    name = config.compute_dtype
    if name == "auto":
        name = "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"
    return mx.bfloat16 if name == "bfloat16" else mx.float32


def _add_lora(module: nn.Module, config: TrainingConfig) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    module.freeze()
    options = {"rank": config.lora.rank, "scale": config.lora.scale, "dropout": 0.0}
    linear_to_lora_layers(module, len(module.layers), options)
    # Drawn again from the run's seed: mlx-lm draws from the global generator.
    key = mx.random.key(config.seed)
    for name, factor in sorted(trainable(module).items()):
        if name.endswith(".lora_a"):
            key, draw = mx.random.split(key)
            bound = factor.shape[0] ** -0.5
            module.update(
                tree_unflatten([(name, mx.random.uniform(-bound, bound, factor.shape, key=draw))])
            )


def _embedding_name(module: Any) -> str:
    return "embed_tokens" if "embed_tokens" in module.model else "wte"


def _masked_name(name: str, down: str) -> str:
    """Return a parameter's name once its down projection is wrapped in a MaskedDown."""
    return name.replace(f".{down}.", f".{down}.down.")


def _checkpoint_ffn(module: nn.Module) -> None:
    """Recompute each layer's FFN in the backward pass: its activations are the widest."""
    ffn = down_part(module).path.rpartition(".")[0]
    for layer in unit_layers(module).values():
        ffn_module = module_at(layer, ffn)
        ffn_module.__class__ = _checkpointed_class(type(ffn_module))


def _checkpointed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose call keeps only its inputs for the backward pass."""

    def call(self: nn.Module, x: mx.array) -> mx.array:
        masks = [child._mask for child in self.values() if isinstance(child, MaskedDown)]

        def run(parameters: Any, masks: list[mx.array | None], x: mx.array) -> mx.array:
            self.update(parameters)
            for child in self.values():
                if isinstance(child, MaskedDown):
                    child._mask = masks[0]
            return kind.__call__(self, x)  # type: ignore[no-any-return]

        result: mx.array = mx.checkpoint(run)(self.trainable_parameters(), masks, x)
        return result

    return type(kind.__name__, (kind,), {"__call__": call})

"""What of a model fits on this machine, said before it is downloaded, converted or loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.storage.transformers_import import finish_importing_transformers
from ifp_mlx.subnets.memory import (
    CheckpointSizes,
    checkpoint_sizes,
    model_sizes,
    usable_memory_bytes,
)
from ifp_mlx.units.model_config import ModelConfig

SHARES = (0.75, 0.5)
"""Of the units; what is looked at beside all of them."""

CONTEXT_TOKENS = 4096
_PACKED = {"bits": 4, "group_size": 64, "mode": "affine"}


@dataclasses.dataclass(frozen=True)
class Fit:
    """One amount of units.

    Attributes:
        share: of the units.
        num_kept_units: K.
        weights_bytes: the sub-network alone.
        peak_bytes: with a conversation and what comes and goes while it is loaded and answers.
        fits: whether the peak does.
    """

    share: float
    num_kept_units: int
    weights_bytes: int
    peak_bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class WhatFits:
    """Which amounts of a model fit.

    Attributes:
        num_units: F.
        label: what people call the units.
        available_bytes: where they are to fit.
        context_tokens: length of the conversation that is counted in.
        whole: all units.
        parts: fewer, the most first.
    """

    num_units: int
    label: str
    available_bytes: int
    context_tokens: int
    whole: Fit
    parts: tuple[Fit, ...]

    @property
    def any_fits(self) -> bool:
        """Whether any of the amounts does."""
        return any(fit.fits for fit in (self.whole, *self.parts))

    def line(self) -> str:
        """Return what people read, such as ``17.2 GB, 128 experts; 75 % 13.3 GB fits``."""
        parts = "".join(
            f"; {fit.share:.0%} {_gigabytes(fit.weights_bytes)} {_verdict(fit)}".replace("%", " %")
            for fit in self.parts
        )
        whole = f"{_gigabytes(self.whole.weights_bytes)}, {self.num_units} {self.label}"
        if self.whole.fits:
            return f"{whole}, fits"
        return f"{whole}, does not fit in {_gigabytes(self.available_bytes)}{parts}"


def what_fits(
    sizes: CheckpointSizes,
    *,
    shares: Sequence[float] = SHARES,
    context_tokens: int = CONTEXT_TOKENS,
    limit_bytes: int | None = None,
) -> WhatFits:
    """Return which amounts of a model fit.

    Args:
        sizes: of the model.
        shares: of its units, beside all of them.
        context_tokens: length of a conversation.
        limit_bytes: the most that may be used; None is what the machine has.
    """
    amounts, available_bytes = sizes.amounts, usable_memory_bytes(limit_bytes)

    def fit(share: float) -> Fit:
        kept = amounts.nearest(share)
        predicted = sizes.predict(kept, context_tokens)
        total = predicted.total_bytes
        return Fit(share, kept, predicted.weights_bytes, total, total <= available_bytes)

    return WhatFits(
        amounts.num_units,
        amounts.label,
        available_bytes,
        context_tokens,
        fit(1.0),
        tuple(fit(share) for share in shares),
    )


def what_fits_of_checkpoint(path: Path, *, limit_bytes: int | None = None) -> WhatFits:
    """Return which amounts of a checkpoint directory fit. Reads headers, no weights.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    return what_fits(checkpoint_sizes(path), limit_bytes=limit_bytes)


def advice_before_fetching(
    config: ModelConfig,
    dtype: mx.Dtype | None = None,
    packing: Mapping[str, Any] | None = None,
    *,
    limit_bytes: int | None = None,
) -> list[str]:
    """Return lines that say what of a model would fit, from its configuration alone.

    A second line says the same of the model at 4 bits, where nothing fits as it is. There are no
    lines where the configuration does not say how the weights are stored.

    Args:
        config: of the model.
        dtype: what it will be stored in; None is its own type.
        packing: how it will be quantized; None is as config.json says.
        limit_bytes: the most that may be used; None is what the machine has.
    """
    content = config.content
    if packing is None:
        packing = content.get("quantization") or content.get("quantization_config")

    def found(form: Mapping[str, Any] | None) -> WhatFits | None:
        model = skeleton(config, form, dtype)
        if model is None:
            return None
        return what_fits(model_sizes(model, config), limit_bytes=limit_bytes)

    try:
        as_stored = found(packing)
        packed = None
        if as_stored is not None and packing is None and not as_stored.any_fits:
            packed = found(_PACKED)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # whatever is wrong is said when the model itself is read
    lines = [] if as_stored is None else [as_stored.line()]
    return lines if packed is None else [*lines, f"at 4 bits: {packed.line()}"]


def skeleton(
    config: ModelConfig, packing: Mapping[str, Any] | None, dtype: mx.Dtype | None = None
) -> nn.Module | None:
    """Return the mlx-lm model of a configuration, whose weights are never made. Evaluates nothing.

    Args:
        config: of the model.
        packing: what config.json says of its quantization, or what it will be; None is plain.
        dtype: of its plain weights; None is what the configuration says.

    Returns:
        The model; None where the quantization is another library's.
    """
    finish_importing_transformers()
    from mlx_lm.utils import _get_classes

    model_class, arguments_class = _get_classes(dict(config.content))
    model = cast(nn.Module, model_class(arguments_class.from_dict(dict(config.content))))
    model.set_dtype(dtype or _stored_dtype(config))
    if packing is None:
        return model
    if packing.get("quant_method") == "mxfp4":  # gpt-oss as published: its experts only
        packing = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
        stacks = {part.path.rpartition(".")[0] for part in config.family.kind.parts[1:]}
    elif "bits" in packing and "group_size" in packing:
        stacks = None
    else:
        return None

    def is_packed(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        own = packing.get(path)
        if isinstance(own, bool | dict):
            return own
        if stacks is not None and not any(f".{stack}." in path for stack in stacks):
            return False
        return bool(module.weight.shape[-1] % packing["group_size"] == 0)

    nn.quantize(
        model,
        group_size=packing["group_size"],
        bits=packing["bits"],
        mode=packing.get("mode", "affine"),
        class_predicate=is_packed,
    )
    return model


def _stored_dtype(config: ModelConfig) -> mx.Dtype:
    name = config.content.get("torch_dtype") or config.content.get("dtype")
    name = name or config.settings.get("torch_dtype") or config.settings.get("dtype")
    found = getattr(mx, str(name), None)
    return found if isinstance(found, mx.Dtype) else mx.bfloat16


def _verdict(fit: Fit) -> str:
    return "fits" if fit.fits else "does not fit"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

"""Scaled positions that a model really has: mlx-lm passes over a scaling in some families."""

import re

import mlx.nn as nn

from ifp_mlx.errors import ConfigError
from ifp_mlx.units.model_config import ModelConfig

_NAMES = re.compile("rope|rotary", re.IGNORECASE)  # what mlx-lm calls such modules
_UNSCALED = (None, "default", "mrope")  # mrope is the same as none where there is only text


def check_rope_scaling(model: nn.Module, config: ModelConfig) -> None:
    """Refuse a model that was built without the scaling of positions that config.json asks for.

    Raises:
        ConfigError: names the scaling.
    """
    scaling = config.settings.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("factor") == 1:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    ropes = [m for m in model.modules() if _NAMES.search(type(m).__name__)]
    if kind in _UNSCALED or any(type(m) is not nn.RoPE or m.scale != 1.0 for m in ropes):
        return
    raise ConfigError(
        f"config.json asks for the rope scaling {kind!r}, which mlx-lm does not have in "
        f"{config.family.model_type} models; answers to long texts would be wrong"
    )

"""The configuration of a model, checked and read once: what config.json says, typed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ifp_mlx.errors import ConfigError
from ifp_mlx.units.families import find_family
from ifp_mlx.units.kinds import Family

_MAX_SIZE = 2**31
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "rope_theta",
    "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "partial_rotary_factor", "logit_scale",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is known of a model before its weights are read.

    Attributes:
        family: its row in the table.
        hidden_size: D.
        num_hidden_layers: L.
        num_attention_heads: H.
        num_key_value_heads: G.
        head_dim: values of a head.
        context_length: the most positions that the model was made for.
        content: config.json itself, for what builds the model or writes the file again. Settings
            of rotary positions are under both of their names.
    """

    family: Family
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    content: Mapping[str, Any]

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: object) -> "ModelConfig":
        """Return the configuration that the content of a config.json stands for.

        Settings of rotary positions that transformers 5 has under ``rope_parameters`` are given
        their older names as well, the only ones that mlx-lm reads for most families.

        Args:
            content: the JSON object.
            where: the file, for messages.

        Raises:
            ConfigError: it lacks a size or has one that is not a positive integer, or a setting
                that is not a number.
            ArchitectureError: the family is not in the table.
        """
        model_type = content.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError(f"{where} has no model_type")
        family = find_family(model_type)
        top, content = content, _settings_of(content, family)
        names = {key: family.config_names.get(key, key) for key in _SIZES}
        for key in (*names.values(), *family.kind.config_fields):
            _check_size(content, key, where)
        for key in _NUMBERS:
            number = content.get(key)
            if number is not None and (
                type(number) not in (int, float) or not math.isfinite(number)
            ):
                raise ConfigError(f"{where}: {key} is {number!r}, not a number")
        sizes = {key: int(content[name]) for key, name in names.items()}
        num_heads = sizes["num_attention_heads"]

        def optional(key: str) -> Any:
            return content.get(family.config_names.get(key, key))

        return cls(
            family=family,
            hidden_size=sizes["hidden_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=num_heads,
            num_key_value_heads=int(optional("num_key_value_heads") or num_heads),
            head_dim=int(optional("head_dim") or sizes["hidden_size"] // num_heads),
            context_length=int(optional("max_position_embeddings") or _MAX_SIZE),
            content={**rope_at_top(top), **top},
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """The part of the content that is about the text model."""
        return _settings_of(self.content, self.family)

    def content_for(self, num_kept_units: int) -> dict[str, Any]:
        """Return what config.json says of a compact model with K units."""
        amounts = dict.fromkeys(self.family.kind.config_fields, num_kept_units)
        name = self.family.settings
        if name is None or name not in self.content:
            return {**self.content, **amounts}
        return {**self.content, name: {**self.content[name], **amounts}}


def rope_at_top(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``rope_parameters`` says and the older keys do not, under the older keys."""
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    found: dict[str, Any] = {}
    if isinstance(local := rope.get("sliding_attention"), dict):  # Gemma 3: one for each kind
        found["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope.get("full_attention", {})
    found |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        scaling = {key: value for key, value in rope.items() if key not in found}
        found["rope_scaling"] = {"type": kind, **scaling}
    return {
        key: value for key, value in found.items() if value is not None and content.get(key) is None
    }


def _settings_of(content: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    own = content.get(family.settings) if family.settings is not None else None
    return own if isinstance(own, dict) else content


def _check_size(content: Mapping[str, Any], key: str, where: object) -> None:
    if key not in content:
        raise ConfigError(f"{where} has no {key}; convert the model again")
    size = content[key]
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < _MAX_SIZE:
        raise ConfigError(f"{where}: {key} is {size!r}, not a positive integer")

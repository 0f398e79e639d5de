"""The configuration of a model, checked and read once: what config.json says, typed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ifp_mlx.errors import ConfigError
from ifp_mlx.units.families import find_family
from ifp_mlx.units.kinds import Family

_MAX_SIZE = 2**31
_SAVED_COUNT = "num_local_experts"
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Settings that are real numbers, also where they happen to be whole.
_REAL = re.compile("theta|eps|scal|factor|cap|multiplier|drop|range|coef|freq|beta|alpha|std|limit")
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
        top = _with_count_of_experts(_normalised(content), family)
        content = _settings_of(top, family)
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
            content=_with_rope_names({**rope_at_top(top), **top}),
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """The part of the content that is about the text model."""
        return _settings_of(self.content, self.family)

    def with_settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content with some settings of the text model changed."""
        name = self.family.settings
        if name is None or name not in self.content:
            return {**self.content, **changes}
        return {**self.content, name: {**self.content[name], **changes}}

    def content_for(self, num_kept_units: int) -> dict[str, Any]:
        """Return what config.json says of a compact model with K units."""
        return self.with_settings(dict.fromkeys(self.family.kind.config_fields, num_kept_units))


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


def _normalised(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content without what says nothing here, and with integers where they are meant.

    ``auto_map`` names code for transformers, which is never run and would not be copied.
    """
    unset = {key for key in ("quantization", "quantization_config") if content.get(key) is None}
    kept = {key: value for key, value in content.items() if key not in {"auto_map", *unset}}
    whole: dict[str, Any] = _whole_numbers(kept)
    return whole


def _with_count_of_experts(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the content with the number of experts under the name that mlx-lm asks for.

    transformers 5 saves Qwen 3's as ``num_local_experts``; published checkpoints have the other.
    """
    for key in family.kind.config_fields:
        if key == "num_experts" and key not in content and _SAVED_COUNT in content:
            content[key] = content.pop(_SAVED_COUNT)
    return content


def _whole_numbers(value: Any, key: str = "") -> Any:
    """Return a JSON value with ``32.0`` as ``32``, except where a real number is meant."""
    if isinstance(value, dict):
        return {name: _whole_numbers(own, name) for name, own in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(own, key) for own in value]
    if isinstance(value, float) and value.is_integer() and not _REAL.search(key):
        return int(value)
    return value


def _with_rope_names(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with a scaling of positions under all names that mlx-lm asks for."""
    scaling = content.get("rope_scaling")
    if not isinstance(scaling, dict):
        return content
    kind = scaling.get("type") or scaling.get("rope_type")
    names = {} if kind is None else {"type": kind, "rope_type": kind}
    original = "original_max_position_embeddings"  # beside the scaling in Phi-3, else in it
    length = content.get(original) or scaling.get(original)
    lengths = {} if length is None or kind not in ("longrope", "su") else {original: length}
    return {**content, **lengths, "rope_scaling": {**scaling, **lengths, **names}}


def _settings_of(content: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    own = content.get(family.settings) if family.settings is not None else None
    return own if isinstance(own, dict) else content


def _check_size(content: Mapping[str, Any], key: str, where: object) -> None:
    if key not in content:
        raise ConfigError(f"{where} has no {key}; convert the model again")
    size = content[key]
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < _MAX_SIZE:
        raise ConfigError(f"{where}: {key} is {size!r}, not a positive integer")

"""Models by their shape alone: built-in configs and random weights made on the device."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from ifp_mlx.errors import UsageError
from ifp_mlx.selection.predictor import PredictorHead, SparsityPredictor
from ifp_mlx.units.families import find_family
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.modules import family_of, named_arrays

QUANTIZATION_GROUP_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """A whole model's ``config.json`` and how many of its units a sub-network keeps.

    Attributes:
        name: shown in tables.
        config: the keys that mlx-lm reads.
        num_kept_units: K; None for a model that is not sliced unless the user says how far.
    """

    name: str
    config: dict[str, Any]
    num_kept_units: int | None

    @property
    def num_units(self) -> int:
        """F.

        Raises:
            ArchitectureError: a family without units.
            UsageError: no key of its configuration says how many.
        """
        return int(self.config[self._amount_keys()[0]])

    def kept_units(self) -> int:
        """Return K.

        Raises:
            UsageError: this shape is not sliced.
        """
        if self.num_kept_units is None:
            raise UsageError(f"{self.name} has no amount of units to keep; pass `keep_units`")
        return self.num_kept_units

    def compact_config(self) -> dict[str, Any]:
        """Return the configuration of a dense model in the sub-network's shape, of K units.

        Raises:
            ArchitectureError: a family without units.
            UsageError: this shape is not sliced.
        """
        num_kept_units = self.kept_units()
        return {**self.config, **dict.fromkeys(self._amount_keys(), num_kept_units)}

    def _amount_keys(self) -> tuple[str, ...]:
        keys = find_family(self.config["model_type"]).kind.config_fields
        if not keys or not set(keys) <= set(self.config):
            raise UsageError(f"no key of {self.name}'s config.json says how many units it has")
        return keys


def _llama(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **changes,
    }


_LLAMA_8B = _llama(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", _LLAMA_8B, 1536),
        # IFPruning, section 5 and the review discussion: 9B -> 3B.
        Shape(
            "paper-9b",
            _llama(
                hidden_size=2048,
                intermediate_size=24576,
                num_hidden_layers=56,
                num_attention_heads=16,
                num_key_value_heads=2,
                head_dim=128,
                vocab_size=100000,
                tie_word_embeddings=True,
            ),
            6656,
        ),
        Shape(
            "smollm2-135m",
            _llama(
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                vocab_size=49152,
                rope_theta=100000.0,
                tie_word_embeddings=True,
            ),
            1024,
        ),
        # Eight layers as wide as those of Llama-3.1-70B: weights that take longer to read than
        # their kernels take to launch, on a fast accelerator too.
        Shape(
            "wide-8-layers",
            _llama(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=8,
                num_attention_heads=64,
                num_key_value_heads=8,
                head_dim=128,
                vocab_size=32000,
            ),
            7168,
        ),
        Shape(
            "qwen1.5-moe-a2.7b",
            {
                "model_type": "qwen2_moe",
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts_per_tok": 4,
                "num_experts": 60,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "rms_norm_eps": 1e-6,
                "vocab_size": 151936,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": False,
            },
            None,
        ),
        # What Mac users run: 128 experts, 8 of them for each token; half of them kept.
        Shape(
            "qwen3-30b-a3b",
            {
                "model_type": "qwen3_moe",
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
                "rms_norm_eps": 1e-6,
                "vocab_size": 151936,
                "rope_theta": 1000000.0,
                "max_position_embeddings": 40960,
                "tie_word_embeddings": False,
            },
            64,
        ),
        # Seconds on a laptop's CPU: to try the commands out.
        Shape(
            "tiny",
            _llama(
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=512,
            ),
            64,
        ),
    )
}

PREDICTORS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": SHAPES["smollm2-135m"].config,
    "tiny": {**SHAPES["tiny"].config, "hidden_size": 32, "num_hidden_layers": 2},
}


def find_shape(name: str, num_kept_units: int | None = None) -> Shape:
    """Return a built-in shape, or that of a ``config.json`` on disk.

    Args:
        name: of ``SHAPES``, or a path to a config file or to a folder that holds one.
        num_kept_units: K, in place of the built-in one.

    Raises:
        UsageError: neither is there, or K does not fit.
    """
    shape = SHAPES.get(name) or _shape_of_file(name)
    if num_kept_units is None:
        return shape
    if not 1 <= num_kept_units <= shape.num_units:
        raise UsageError(f"{name} has {shape.num_units} units a layer, not {num_kept_units}")
    return dataclasses.replace(shape, num_kept_units=num_kept_units)


def find_predictor_config(name: str) -> dict[str, Any]:
    """Return the config of a predictor's reader: of ``PREDICTORS``, or from a file.

    Raises:
        UsageError: neither is there.
    """
    return PREDICTORS[name] if name in PREDICTORS else _shape_of_file(name).config


def _shape_of_file(name: str) -> Shape:
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = ", ".join(SHAPES)
        raise UsageError(f"no shape {name!r}: neither a config file nor one of {known}") from error
    return Shape(path.parent.name or name, config, None)


def build_model(config: dict[str, Any], dtype: mx.Dtype, bits: int = 16) -> nn.Module:
    """Return an mlx-lm model of this config with random weights. Evaluates.

    The weights are drawn on the device, one array at a time, so that the float32 noise that they
    come from never exists for more than one.

    Args:
        config: as in ``config.json``.
        dtype: floating type of the weights, of the scales of quantized ones, and of computing.
        bits: 16 for plain weights; 4 or 8 quantizes every linear layer and embedding.
    """
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    model.eval()
    model.set_dtype(dtype)
    if bits != 16:
        nn.quantize(model, group_size=QUANTIZATION_GROUP_SIZE, bits=bits)
    for array in named_arrays(model).values():
        mx.eval(array)
    mx.clear_cache()  # of the noise
    return model


def build_predictor(config: dict[str, Any], shape: UnitShape, dtype: mx.Dtype) -> SparsityPredictor:
    """Return a sparsity predictor with random weights for a model's units. Evaluates.

    Its expansion is random too, not zero, so that each instruction selects other units.

    Args:
        config: of the model that reads.
        shape: of the units that are scored.
        dtype: of the model that reads.
    """
    prior = mx.random.normal((len(shape.layers), shape.num_units))
    head = PredictorHead(2 * int(config["hidden_size"]), prior)
    head.expand.weight = mx.random.uniform(-0.1, 0.1, head.expand.weight.shape)
    mx.eval(head.parameters())
    return SparsityPredictor(build_model(config, dtype), head)


def random_ids(num_tokens: int, *models: nn.Module) -> list[int]:
    """Return the ids of some tokens that are in the vocabulary of every one of some models."""
    vocab_size = min(model.args.vocab_size for model in models)
    return mx.random.randint(0, vocab_size, (num_tokens,)).tolist()  # type: ignore[return-value]


def is_mixture(model: nn.Module) -> bool:
    """Return whether a model is a mixture of experts: each token reads some of its weights."""
    return family_of(model).kind.router is not None

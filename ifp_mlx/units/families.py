"""The table of model families: where each keeps its units. The one place to add an architecture.

Read from the model files of mlx-lm 0.32. A family belongs here if masking a unit and deleting it
are the same thing; gemma3n, whose FFN cuts activations off at a quantile over all units, does not.
"""

from typing import Any

from ifp_mlx.errors import ArchitectureError
from ifp_mlx.units.kinds import ARRAYS, Family, Part, Router, UnitKind

_FFN_MULTIPLE = 64
"""The widest group that mlx quantizes in by default, so that compact models can be packed."""


def _ffn(*rows: str | Part, down: str, config_fields: tuple[str, ...]) -> UnitKind:
    """Return the kind of FFN units: a row of each of some matrices, and a column of down."""
    parts = [row if isinstance(row, Part) else Part(row) for row in rows]
    return UnitKind("ffn", "FFN units", (*parts, Part(down, axis=-1)), config_fields, _FFN_MULTIPLE)


_FLAT = Router()
_GROUPED = Router(groups="n_group", chosen_groups="topk_group")


def _experts(
    router: str | Part,
    stacks: str,
    *arrays: Part,
    count: str,
    router_keys: Router = _FLAT,
) -> UnitKind:
    """Return the kind of experts: a row of the router, and one matrix of each of three stacks.

    Args:
        router: the module whose rows score the experts.
        stacks: the module with the stacked matrices.
        arrays: whatever else is indexed by expert.
        count: the key of config.json that says how many there are.
        router_keys: the keys that say how they are chosen.
    """
    first = router if isinstance(router, Part) else Part(router)
    arrays_of_stack = (*ARRAYS, "global_scale")
    matrices = [
        Part(f"{stacks}.{name}_proj", arrays=arrays_of_stack) for name in ("gate", "up", "down")
    ]
    return UnitKind("expert", "experts", (first, *arrays, *matrices), (count,), 1, router_keys)


_WIDTH = ("intermediate_size",)
_GATED = _ffn("mlp.gate_proj", "mlp.up_proj", down="mlp.down_proj", config_fields=_WIDTH)
_STACKED = _ffn(Part("mlp.gate_up_proj", stacked=2), down="mlp.down_proj", config_fields=_WIDTH)
_UNGATED = _ffn("mlp.up_proj", down="mlp.down_proj", config_fields=_WIDTH)

_GATED_FAMILIES = (
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite",
    "helium", "hunyuan_v1_dense", "internlm3", "llama", "mimo", "minicpm", "ministral3", "mistral",
    "olmo2", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
)  # fmt: skip

_SWITCH = _experts("mlp.gate", "mlp.switch_mlp", count="num_experts")
_SPARSE_BLOCK = _experts(
    "block_sparse_moe.gate", "block_sparse_moe.switch_mlp", count="num_local_experts"
)
_GRANITE = _experts(
    "block_sparse_moe.router.layer", "block_sparse_moe.switch_mlp", count="num_local_experts"
)
_CORRECTED_ROUTER = Part("mlp.gate", arrays=("weight", "e_score_correction_bias"))
_CORRECTED = _experts(
    _CORRECTED_ROUTER, "mlp.switch_mlp", count="n_routed_experts", router_keys=_GROUPED
)

_INSIDE_VISION: Any = {
    "layers_path": "language_model.model.layers",
    "trunk": "language_model.model",
    "settings": "text_config",
}
"""Where the text model of one that also sees is."""

_MIXTURES = (
    *(
        Family(name, _SWITCH)
        for name in ("mellum", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next")
    ),
    Family("qwen3_5_moe", _SWITCH, **_INSIDE_VISION),
    Family("mixtral", _SPARSE_BLOCK),
    Family("phimoe", _SPARSE_BLOCK),
    Family("granitemoe", _GRANITE),
    Family("gpt_oss", _experts("mlp.router", "mlp.experts", count="num_local_experts")),
    Family(
        "deepseek_v2",
        _experts(
            Part("mlp.gate", arrays=("weight",)),
            "mlp.switch_mlp",
            count="n_routed_experts",
            router_keys=_GROUPED,
        ),
    ),
    *(Family(name, _CORRECTED) for name in ("deepseek_v3", "glm4_moe", "glm4_moe_lite")),
    Family(
        "dots1",
        _experts(_CORRECTED_ROUTER, "mlp.experts", count="n_routed_experts", router_keys=_GROUPED),
    ),
    Family(
        "afmoe",
        _experts(
            "mlp.router.gate",
            "mlp.experts",
            Part("mlp", arrays=("expert_bias",)),
            count="num_experts",
            router_keys=_GROUPED,
        ),
    ),
    Family(
        "lfm2_moe",
        _experts(
            "feed_forward.gate",
            "feed_forward.switch_mlp",
            Part("feed_forward", arrays=("expert_bias",)),
            count="num_experts",
        ),
    ),
    Family(
        "ernie4_5_moe",
        _experts(
            "mlp.gate", "mlp.switch_mlp", count="moe_num_experts", router_keys=Router("moe_k")
        ),
    ),
    Family(
        "gemma4_text",
        _experts(
            "router.proj",
            "experts.switch_glu",
            Part("router", arrays=("per_expert_scale",)),
            count="num_experts",
            router_keys=Router("top_k_experts"),
        ),
    ),
)
"""Mixtures of experts. Left out: llama4 (scales the input of its one expert), hunyuan (another
number of experts a layer), longcat_flash (experts that do nothing), dbrx and phixtral (experts that
mlx-lm does not stack)."""

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(Family(model_type, _GATED) for model_type in _GATED_FAMILIES),
        *_MIXTURES,
        Family("qwen3_5", _GATED, **_INSIDE_VISION),
        Family("glm", _STACKED),
        Family("glm4", _STACKED),
        Family("phi3", _STACKED),
        Family("nemotron", _UNGATED),
        Family(
            "internlm2",
            _ffn(
                "feed_forward.w1", "feed_forward.w3", down="feed_forward.w2", config_fields=_WIDTH
            ),
        ),
        Family("starcoder2", _ffn("mlp.c_fc", down="mlp.c_proj", config_fields=_WIDTH)),
        Family("phi", _ffn("mlp.fc1", down="mlp.fc2", config_fields=_WIDTH)),
        Family(
            "gpt2",
            # No key of its configuration says how wide its FFN is.
            _ffn("mlp.c_fc", down="mlp.c_proj", config_fields=()),
            layers_path="model.h",
            config_names={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "num_key_value_heads": "n_head",
                "max_position_embeddings": "n_positions",
            },
        ),
    )
}


def find_family(model_type: str) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        ArchitectureError: it is not in the table.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ArchitectureError(
            f"model_type {model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        ) from None

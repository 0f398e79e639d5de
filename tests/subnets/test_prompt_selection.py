"""A prompt selects for itself only where its answer comes sooner so."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.subnets.prompt_selection import selecting_pays
from ifp_mlx.subnets.selectors import SELECTORS
from ifp_mlx.units.model_config import ModelConfig

SIZES = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "intermediate_size": 14336,
}


def pays(prompt_tokens: int, tokens_read: int, kept: int = 1536) -> bool:
    config = ModelConfig.parse(SIZES, "config.json")
    return selecting_pays(config, 14336, kept, prompt_tokens=prompt_tokens, tokens_read=tokens_read)


def test_a_long_prompt_pays_where_the_selector_reads_a_window() -> None:
    # 8B -> 3B: a token saves 157 of 218 million multiply-adds a layer; 512 read, 512 for slicing.
    assert [pays(length, min(length, 512)) for length in (100, 1000, 1400, 1600)] == [
        False,
        False,
        False,
        True,
    ]
    assert not pays(1600, 512, kept=12288)


def test_a_selector_that_reads_the_whole_prompt_never_pays() -> None:
    assert not any(pays(length, length) for length in (10, 1000, 100_000))


def test_a_selector_that_reads_nothing_pays_sooner() -> None:
    assert not pays(512, 0)
    assert pays(800, 0)


def test_selectors_say_what_they_read() -> None:
    read = {name: kind.tokens_read(2000) for name, kind in SELECTORS.items()}
    assert read == {"predictor": 512, "blend": 2000, "static": 0, "prompt": 2000, "random": 0}
    assert SELECTORS["predictor"].tokens_read(20) == 20


def test_a_mixture_reads_no_faster_in_part(tiny_checkpoint: Callable[..., Path]) -> None:
    assistant = Assistant.load(tiny_checkpoint("qwen3_moe"))
    assert not assistant.selecting_pays("x" * 400, assistant.amounts.least)


@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_a_model_that_is_not_kept_whole_is_always_selected_from(
    tiny_checkpoint: Callable[..., Path], memory_bytes: int | None
) -> None:
    from ifp_mlx.slicing.compact import CutOptions

    options = CutOptions(memory_bytes=memory_bytes, force=True)
    assistant = Assistant.load(tiny_checkpoint(), options=options)
    assert assistant.selecting_pays("short", 64) is (memory_bytes is not None)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from ifp_mlx.cli.app import make_app
from ifp_mlx.convert.export import export_checkpoint
from ifp_mlx.convert.model_card import MeasuredQuality, ModelCard
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.errors import ArchitectureError, SelectionError, UsageError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import NamedSelector, RandomSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions, slice_model
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.origin import Origin, read_origin, write_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.kinds import UnitShape

CheckpointFactory = Callable[..., Path]
TOKEN_IDS = [3, 60, 5, 41, 99]
TOKENS = mx.array([TOKEN_IDS])
NUM_UNITS, KEPT = 192, 128
CARD = ModelCard(
    "org/base", "mit", "write\nPython", "random", KEPT, NUM_UNITS, 3, "FFN units", 10, 20
)


def random_selection(num_layers: int = 3, num_units: int = NUM_UNITS) -> Selection:
    shape = UnitShape(tuple(range(num_layers)), num_units)
    named = NamedSelector(RandomSelector(shape), SelectorSpec("random"), "ffn", shape)
    return select(named, (), KEPT)


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def mlx_lm_logits(folder: Path) -> mx.array:
    """Load the folder with mlx-lm alone."""
    from mlx_lm import load

    model = load(str(folder))[0]
    return cast(mx.array, model(TOKENS))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "starcoder2", "phi", "cohere"])
def test_exported_checkpoint_is_the_compact_model(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(family)
    selection = random_selection()
    compact = slice_model(load_model(source)[0], selection)
    expected = compact(TOKENS)
    made = export_checkpoint(compact, selection, source, tmp_path / "out", CARD)
    assert mx.array_equal(mlx_lm_logits(made.path), expected)
    assert read_config(made.path).content["intermediate_size"] == KEPT
    assert made.is_plain
    assert mx.array_equal(compact(TOKENS), expected)  # the exported model still is there
    kept, _ = Selection.load(made.path / "ifp" / "selection.safetensors")
    assert mx.array_equal(kept.pick.indices, selection.pick.indices)


def test_exported_checkpoint_brings_everything_a_model_needs(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint()
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    write_origin(source, Origin(base_model="org/base", licence="mit"))
    selection = random_selection()
    compact = slice_model(load_model(source)[0], selection)
    made = export_checkpoint(compact, selection, source, tmp_path / "out", CARD)
    assert load_tokenizer(made.path).eos_token_ids == {2, 0}
    assert load_tokenizer(made.path).chat_template
    assert read_origin(made.path).base_model == "org/base"
    card = (made.path / "README.md").read_text()
    for line in (
        "license: mit",
        "base_model: org/base",
        "> write Python",
        f"| FFN units kept | {KEPT} of {NUM_UNITS} in each of 3 layers |",
        "Not measured.",
    ):
        assert line in card


def test_family_without_intermediate_size_is_refused(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint("gpt2")
    config = json.loads((source / "config.json").read_text())
    del config["intermediate_size"]  # the tiny models have it, real GPT-2 does not
    (source / "config.json").write_text(json.dumps(config))
    selection = random_selection()
    compact = slice_model(load_model(source)[0], selection)
    with pytest.raises(
        ArchitectureError, match="gpt2 models have no key for their width in config"
    ):
        export_checkpoint(compact, selection, source, tmp_path / "out", CARD)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantized_export_equals_quantizing_the_sliced_weights(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, mode: str
) -> None:
    source = tiny_checkpoint()
    selection = random_selection()
    compact = slice_model(load_model(source)[0], selection)
    quantization = make_quantization(bits=4, group_size=32 if mode == "affine" else None, mode=mode)
    made = export_checkpoint(
        compact, selection, source, tmp_path / "out", CARD, quantization=quantization
    )
    down = load_model(made.path)[0].layers[2].mlp.down_proj
    expected = mx.quantize(compact.layers[2].mlp.down_proj.weight, 32, 4, mode=mode)
    for part, values in zip(("weight", "scales", "biases"), expected, strict=False):
        assert mx.array_equal(down[part], values), part
    assert not made.is_plain


def test_packed_source_stays_packed_or_becomes_plain(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    dense = tiny_checkpoint(hidden_size=64)
    quantization = make_quantization(bits=4, group_size=32)
    source = quantize_checkpoint(dense, tmp_path / "packed", quantization).path
    selection = random_selection()
    model = load_model(source)[0]
    compact = slice_model(model, selection)
    expected = compact(TOKENS)
    packed = export_checkpoint(compact, selection, source, tmp_path / "out", CARD)
    assert not packed.is_plain
    assert mx.array_equal(mlx_lm_logits(packed.path), expected)
    settings = read_config(packed.path).content["quantization"]
    assert settings["bits"] == 4
    assert settings["model.layers.0.mlp.down_proj"]["bits"] == 8  # quantized again, says slicing
    exact = slice_model(model, selection, CutOptions(exact_down=True))
    plain = export_checkpoint(exact, selection, source, tmp_path / "plain", CARD, dequantize=True)
    assert plain.is_plain
    assert not any(key.startswith("quantization") for key in read_config(plain.path).content)
    assert mx.allclose(mlx_lm_logits(plain.path), exact(TOKENS), atol=1e-4)


def test_exported_type_can_be_chosen(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    selection = random_selection()
    compact = slice_model(load_model(source)[0], selection)
    made = export_checkpoint(compact, selection, source, tmp_path / "out", CARD, dtype=mx.bfloat16)
    arrays = arrays_of(load_model(made.path)[0])
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16}


def test_card_states_what_was_measured() -> None:
    card = ModelCard(
        None, None, None, "blend", KEPT, NUM_UNITS, 3, "FFN units", 10, 20, adapted=True,
        requantization_error=0.00123,
        quality={"python": MeasuredQuality(2.0, 2.5, 1234), "yes or no": MeasuredQuality(7, 1, 99)},
    ).text("name")  # fmt: skip
    assert "| python | 2.000 | 2.500 | 1,234 |" in card
    assert "| yes or no |" not in card
    assert "Fewer than 100 tokens, left out: yes or no." in card
    assert "relative error 1.23e-03" in card
    assert "changed by an IFP adapter" in card
    assert "The units come from a selection file." in card
    assert "license:" not in card
    assert "base_model:" not in card


# The command line


def export_arguments(source: Path, target: Path, *more: str) -> list[str]:
    chosen = ["--selector", "random", "--keep-units", str(KEPT), "--task", "help me write Python"]
    return ["export", "--model", str(source), "-o", str(target), *chosen, *more]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))


def test_export_command(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    arguments = export_arguments(source, tmp_path / "out")
    result = CliRunner().invoke(make_app(), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    assert (answer["num_kept_units"], answer["num_units"]) == (KEPT, NUM_UNITS)
    assert read_config(Path(answer["path"])).content["intermediate_size"] == KEPT
    again = CliRunner().invoke(make_app(), arguments)
    assert isinstance(again.exception, UsageError)
    file = tmp_path / "out" / "ifp" / "selection.safetensors"
    second = ["export", "--model", str(source), "-o", str(tmp_path / "b"), "--selection", str(file)]
    result = CliRunner().invoke(make_app(), [*second, "--quantize", "8", "--group-size", "32"])
    assert result.exit_code == 0, result.output
    assert "weights are packed, for mlx-lm" in result.stderr
    assert read_config(tmp_path / "b").content["quantization"]["bits"] == 8


def test_export_command_measures(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    answer = "2 and that is all. " * 20
    (data / "sums.jsonl").write_text(json.dumps({"prompt": "1+1", "response": answer}) + "\n")
    arguments = export_arguments(tiny_checkpoint(), tmp_path / "out", "--data", str(data))
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output
    assert "| sums |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --task or --selection"),
        (["--task", "x", "--selection", "f"], "give --task or --selection"),
        (["--task", "x", "--group-size", "32"], "--group-size needs --quantize"),
        (["--task", "x", "--quantize", "4", "--dequantize"], "exclude each other"),
        (["--task", "x", "--quantize", "7"], "`bits` must be one of"),
        (["--selection", "f", "--keep", "0.5"], "--selection says how many units"),
        (["--task", "x", "--keep", "1.0"], "all units are kept"),
    ],
    ids=str,
)
def test_export_command_refuses(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, arguments: list[str], message: str
) -> None:
    common = ["export", "--model", str(tiny_checkpoint()), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(make_app(), [*common, *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_selection_of_another_model_is_refused(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    file = tmp_path / "other.safetensors"
    random_selection(num_layers=2).save(file)
    arguments = ["--model", str(tiny_checkpoint()), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(make_app(), ["export", *arguments, "--selection", str(file)])
    assert isinstance(result.exception, SelectionError)
    assert "is for 2 layers of 192 units, the model has 3 layers of 192" in str(result.exception)

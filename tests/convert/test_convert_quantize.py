import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from ifp_mlx.cli.app import make_app
from ifp_mlx.convert.quantize import RECIPES, make_quantization, quantize_checkpoint
from ifp_mlx.errors import CheckpointError, UsageError
from ifp_mlx.storage.origin import Origin, read_origin, write_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

CheckpointFactory = Callable[..., Path]
TOKENS = mx.array([[3, 60, 5, 41]])
# Every width of these models is a multiple of 128.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
COMBINATIONS = [
    *[("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)],
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize(("mode", "bits", "group_size"), COMBINATIONS)
def test_quantized_checkpoint_holds_what_mlx_quantizes(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, mode: str, bits: int, group_size: int
) -> None:
    source = tiny_checkpoint(**WIDE)
    quantization = make_quantization(bits=bits, group_size=group_size, mode=mode)
    made = quantize_checkpoint(source, tmp_path / "out", quantization)
    plain = arrays_of(load_model(source)[0])
    model, config = load_model(made.path)
    assert config["quantization"] == {"bits": bits, "group_size": group_size, "mode": mode}
    down = model.layers[1].mlp.down_proj
    expected = mx.quantize(
        plain["model.layers.1.mlp.down_proj.weight"], group_size, bits, mode=mode
    )
    for part, values in zip(("weight", "scales", "biases"), expected, strict=False):
        assert mx.array_equal(down[part], values), part
    load_tokenizer(made.path)


def test_sizes_are_those_on_disk(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = tiny_checkpoint(**WIDE)
    reports: list[tuple[int, int]] = []
    made = quantize_checkpoint(
        source,
        tmp_path / "out",
        make_quantization(bits=4, group_size=64),
        progress=lambda stage, done, total: reports.append((done, total)),
    )
    before = sum(array.nbytes for array in arrays_of(load_model(source)[0]).values())
    num_weights = before // 4
    after = sum(array.nbytes for array in arrays_of(load_model(made.path)[0]).values())
    assert (made.bytes_before, made.bytes_after) == (before, after)
    assert made.bits_per_weight == pytest.approx(after * 8 / num_weights)
    assert 4 < made.bits_per_weight < 5.2
    assert made.num_plain == 0
    assert reports[-1] == (after, after)
    assert all(done <= total for done, total in reports)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_mix_two_widths(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, recipe: str
) -> None:
    source = tiny_checkpoint(**WIDE)
    made = quantize_checkpoint(source, tmp_path / "out", make_quantization(recipe=recipe))
    model, _ = load_model(made.path)
    widths = {m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    low, high = map(int, recipe.split("_")[1:])
    assert widths == {low, high}
    assert mx.isfinite(model(TOKENS)).all().item()


def test_quantizing_again_starts_from_the_dequantized_values(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint(**WIDE)
    write_origin(source, Origin(base_model="org/base"))
    first = quantize_checkpoint(source, tmp_path / "q8", make_quantization(bits=8))
    second = quantize_checkpoint(first.path, tmp_path / "q4", make_quantization(bits=4))
    dense = arrays_of(load_model(first.path, mx.float32)[0])
    model, _ = load_model(second.path)
    expected = mx.quantize(dense["model.layers.0.mlp.up_proj.weight"], 64, 4)
    assert mx.array_equal(model.layers[0].mlp.up_proj.weight, expected[0])
    assert read_origin(second.path).base_model == "org/base"


def test_matrices_that_no_group_divides_stay_plain(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint(hidden_size=32, intermediate_size=192)
    made = quantize_checkpoint(source, tmp_path / "out", make_quantization(group_size=64))
    model, _ = load_model(made.path)
    assert isinstance(model.layers[0].mlp.up_proj, nn.Linear)  # 32 columns
    assert isinstance(model.layers[0].mlp.down_proj, nn.QuantizedLinear)  # 192 columns
    assert made.num_plain == 3 * 6 + 1  # q, k, v, o, gate, up of each layer, and the embedding


def test_more_bits_are_closer_to_the_original(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint(**WIDE)
    exact = np.array(load_model(source)[0](TOKENS))
    errors = []
    for bits in (3, 5, 8):
        made = quantize_checkpoint(source, tmp_path / str(bits), make_quantization(bits=bits))
        errors.append(np.abs(np.array(load_model(made.path)[0](TOKENS)) - exact).mean())
    # Two or three bits more: steps at least a third as wide, at most an eighth.
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "`bits` must be one of 2, 3, 4, 5, 6, 8"),
        ({"group_size": 48}, "`group_size` must be one of 32, 64, 128"),
        ({"mode": "fp8"}, "there is no mode 'fp8'; there are: affine, mxfp4"),
        ({"mode": "mxfp4", "bits": 8}, "mode mxfp4 always has 4 bits in groups of 32"),
        ({"mode": "nvfp4", "group_size": 32}, "mode nvfp4 always has 4 bits in groups of 16"),
        ({"recipe": "mixed_9_9"}, "there is no recipe 'mixed_9_9'"),
        ({"recipe": "mixed_3_6", "bits": 4}, "a recipe chooses the bits itself"),
        ({"recipe": "mixed_3_6", "mode": "mxfp4"}, "a recipe chooses the bits itself"),
    ],
    ids=str,
)
def test_combinations_that_mlx_does_not_have(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_quantization(**arguments)


def test_recipe_that_does_not_fit_the_family(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint("gpt2", vocab_size=264)
    with pytest.raises(CheckpointError, match="needs layers named down_proj, which gpt2 models"):
        quantize_checkpoint(source, tmp_path / "out", make_quantization(recipe="mixed_3_6"))
    assert not (tmp_path / "out").exists()


def test_quantize_command(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = tiny_checkpoint(**WIDE)
    arguments = ["quantize", str(source), "-o", str(tmp_path / "out"), "--mode", "mxfp8"]
    result = CliRunner().invoke(make_app(), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["bits"], answer["group_size"], answer["mode"]) == (8, 32, "mxfp8")
    assert answer["bytes_after"] < answer["bytes_before"]
    again = CliRunner().invoke(make_app(), arguments)
    assert isinstance(again.exception, UsageError)
    replaced = CliRunner().invoke(make_app(), [*arguments, "--force"])
    assert "bits a weight" in replaced.stderr
    assert replaced.stdout == ""


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_convert_command_quantizes(
    tiny_checkpoint: CheckpointFactory,
    tiny_gguf: CheckpointFactory,
    tmp_path: Path,
    kind: str,
) -> None:
    source = tiny_checkpoint() if kind == "folder" else tiny_gguf()
    plain = tmp_path / "plain"
    arguments = ["convert", str(source), "--dtype", "float32"]
    assert CliRunner().invoke(make_app(), [*arguments, "-o", str(plain)]).exit_code == 0
    packed = [*arguments, "-o", str(tmp_path / "out"), "--quantize", "8", "--group-size", "32"]
    result = CliRunner().invoke(make_app(), packed)
    assert result.exit_code == 0, result.output
    model, config = load_model(tmp_path / "out")
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    expected = mx.quantize(load_model(plain)[0].layers[2].mlp.up_proj.weight, 32, 8)
    assert mx.array_equal(model.layers[2].mlp.up_proj.weight, expected[0])
    assert not (tmp_path / "out" / "plain").exists()
    refused = CliRunner().invoke(
        make_app(), [*arguments, "-o", str(tmp_path / "x"), "--group-size", "32"]
    )
    assert isinstance(refused.exception, UsageError)

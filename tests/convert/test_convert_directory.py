import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.errors import CheckpointError, ResourceError, UsageError
from ifp_mlx.slicing.unit_file import unit_file_is_current
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.files import staged_directory
from ifp_mlx.storage.origin import Origin, read_origin, write_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

CheckpointFactory = Callable[..., Path]
TOKENS = mx.array([[3, 60, 5, 41, 99]])


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2"])
def test_converted_directory_gives_the_same_logits(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    # transformers insists on an integer there, the tiny models of other tests have a float.
    changes = {"query_pre_attn_scalar": 8} if family == "gemma2" else {}
    source = tiny_checkpoint(family, **changes)
    reports: list[tuple[str, int, int]] = []
    made = convert_checkpoint(
        source, tmp_path / "out", progress=lambda *report: reports.append(report)
    )
    expected = load_model(source)[0](TOKENS)
    assert mx.array_equal(load_model(made.path)[0](TOKENS), expected)
    assert (made.model_type, made.dtype) == (family, "float32")
    assert reports[-1] == ("converting", made.num_bytes, made.num_bytes)


def test_converted_directory_is_cast(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    made = convert_checkpoint(tiny_checkpoint(), tmp_path / "out", dtype=mx.bfloat16)
    model, config = load_model(made.path)
    assert {array.dtype for array in arrays_of(model).values()} == {mx.bfloat16}
    assert config["torch_dtype"] == made.dtype == "bfloat16"


def test_rope_parameters_are_written_where_mlx_lm_reads_them(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as load_with_mlx_lm

    source = tiny_checkpoint()
    config = json.loads((source / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0}
    (source / "config.json").write_text(json.dumps(config))
    made = convert_checkpoint(source, tmp_path / "out")
    expected = load_model(source)[0](TOKENS)
    assert mx.array_equal(load_with_mlx_lm(made.path)[0](TOKENS), expected)
    assert json.loads((made.path / "config.json").read_text())["rope_theta"] == 300.0


def test_packed_checkpoints_stay_packed(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    from mlx_lm.utils import quantize_model, save_config, save_model

    source = tiny_checkpoint()
    model, config = quantize_model(*load_model(source), group_size=32, bits=4)
    expected = model(TOKENS)
    save_model(source, model)
    save_config(config, source / "config.json")
    made = convert_checkpoint(source, tmp_path / "out")
    assert mx.array_equal(load_model(made.path)[0](TOKENS), expected)


def test_shards_become_one_checkpoint_and_code_stays_behind(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2")
    expected = load_model(source)[0](TOKENS)
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    (source / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(weights, 1):
        file = f"model-{number:05d}-of-{len(weights):05d}.safetensors"
        mx.save_safetensors(str(source / file), {name: weights[name]})
        weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("modeling.py", "training_args.bin", "generation_config.json", "notes.txt"):
        (source / name).write_text("{}")
    write_origin(source, Origin(base_model="org/base", licence="mit"))
    made = convert_checkpoint(source, tmp_path / "out")
    assert mx.array_equal(load_model(made.path)[0](TOKENS), expected)
    assert load_tokenizer(made.path).chat_template
    assert read_origin(made.path).base_model == "org/base"
    assert {path.name for path in made.path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "ifp",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "is a pickle file, which can run code when read"),
        ("model.pt", "is a pickle file"),
        ("model.safetensors", "is one file of a checkpoint; give the folder"),
        ("nothing", "neither a checkpoint folder nor a GGUF file"),
    ],
)
def test_files_that_are_no_source(tmp_path: Path, name: str, message: str) -> None:
    if name != "nothing":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_the_source_leaves_nothing(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint()
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds values that are not num"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_missing_tokenizer_leaves_nothing(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint()
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_full_disk_is_noticed_before(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"needs 0\.00 GB, the disk has 0\.00 GB free"):
        convert_checkpoint(tiny_checkpoint(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_existing_target_is_replaced_only_when_asked(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    source = tiny_checkpoint()
    with pytest.raises(UsageError, match="exists already; choose another name or pass `overwrite`"):
        convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    convert_checkpoint(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_damaged_origin_is_one_line(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    assert read_origin(folder) == Origin()
    write_origin(folder, Origin(source="here"))
    for content in ("{", "[]", '{"source": 3}', '{"unknown": "x"}'):
        (folder / "ifp" / "origin.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"origin\.json is damaged"):
            read_origin(folder)


def test_units_can_be_stored_one_by_one_at_once(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = tiny_checkpoint()
    assert not unit_file_is_current(convert_checkpoint(source, tmp_path / "plain").path)
    made = convert_checkpoint(source, tmp_path / "out", unit_major=True)
    assert unit_file_is_current(made.path)


# Staging


def test_one_process_at_a_time_writes_a_folder_and_remains_of_a_dead_one_go(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from ifp_mlx.storage.files import staged_directory\n"
        "with staged_directory(Path(sys.argv[1])) as staging:\n"
        "    print(staging, flush=True)\n    time.sleep(60)\n"
    )
    target = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )  # fmt: skip
    assert process.stdout is not None
    live = Path(process.stdout.readline().strip())
    try:
        for overwrite in (False, True):
            with (
                pytest.raises(UsageError, match=r"another process is writing .*model; wait for it"),
                staged_directory(target, overwrite=overwrite),
            ):
                pass
        assert live.is_dir()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with staged_directory(target, overwrite=True):
        assert not live.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_config_of_another_family_is_kept_apart(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    made = convert_checkpoint(tiny_checkpoint("mistral"), tmp_path / "out")
    assert read_config(made.path).family.model_type == "mistral"

"""The unit file holds every unit once more, and is whole, current or refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.errors import CheckpointError, ResourceError
from ifp_mlx.slicing.packed_codes import decode_columns, pack_codes, unpack_codes
from ifp_mlx.slicing.unit_file import UNIT_FILE, unit_file_is_current, write_unit_file
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.tensor_files import read_header

CheckpointFactory = Callable[..., Path]


def test_a_record_is_the_unit_s_rows_and_column(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint()
    unit_file = write_unit_file(path)
    weights = load_arrays(path / "model.safetensors")[0]
    records = load_arrays(unit_file)[0]
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (
            np.array(weights[f"{prefix}.{name}_proj.weight"]) for name in ("gate", "up", "down")
        )
        stored = np.array(records[f"layers.{layer}"]).view(np.float32)
        np.testing.assert_array_equal(stored, np.concatenate([gate, up, down.T], axis=1))


def test_units_are_aligned(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint(hidden_size=36)  # 432 bytes a unit
    tensors = read_header(write_unit_file(path)).values()
    assert {tensor.shape for tensor in tensors} == {(192, 448)}
    assert next(iter(tensors)).offset % 4096 == 0


def test_progress_ends_at_the_size_of_the_file(tiny_checkpoint: CheckpointFactory) -> None:
    seen: list[tuple[int, int]] = []
    unit_file = write_unit_file(
        tiny_checkpoint(), on_bytes=lambda done, total: seen.append((done, total))
    )
    size_bytes = unit_file.stat().st_size
    assert len(seen) == 3
    assert seen[-1] == (size_bytes, size_bytes)


def test_unit_file_of_other_weights_is_not_current(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint()
    assert not unit_file_is_current(path)
    write_unit_file(path)
    assert unit_file_is_current(path)
    weights = load_arrays(path / "model.safetensors")[0]
    changed = {name: array + 1 for name, array in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), changed, {"format": "mlx"})
    assert not unit_file_is_current(path)


def rewrite_header(unit_file: Path, change: Callable[[dict[str, object]], None]) -> None:
    content = unit_file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    padded = json.dumps(header).encode().ljust(size)
    unit_file.write_bytes(content[:8] + padded + content[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].update(format_version="2"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["layers.1"].update(shape=[96, 768]),
        lambda header: header["layers.2"].update(data_offsets=[0, 10]),
    ],
    ids=["version", "no-metadata", "shape", "offsets"],
)
def test_unit_file_with_another_header_is_not_current(
    tiny_checkpoint: CheckpointFactory, change: Callable[[dict[str, object]], None]
) -> None:
    path = tiny_checkpoint()
    rewrite_header(write_unit_file(path), change)
    assert not unit_file_is_current(path)


def test_only_one_process_writes(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint()
    (path / "ifp").mkdir()
    with (
        filelock.FileLock(path / "ifp" / ".units.lock"),
        pytest.raises(ResourceError, match=r"another process is writing .*units\.safetensors"),
    ):
        write_unit_file(path)


def test_checkpoint_of_another_layout_is_refused(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint("gpt2")
    weights = load_arrays(path / "model.safetensors")[0]
    # transformers stores gpt2 without this prefix and its matrices the other way round.
    moved = {
        name.removeprefix("model."): mx.contiguous(array.T)
        if name.endswith("proj.weight") or "c_fc.weight" in name or "c_attn.weight" in name
        else array
        for name, array in weights.items()
    }
    mx.eval(moved)
    mx.save_safetensors(str(path / "model.safetensors"), moved, {"format": "mlx"})
    with pytest.raises(CheckpointError, match="is not stored as mlx-lm has it; run ifp convert"):
        write_unit_file(path)


@pytest.mark.slow
def test_killed_runs_leave_no_part_of_a_file(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint(hidden_size=128, intermediate_size=1024, num_hidden_layers=8)
    # Slow enough to be killed while it writes.
    program = (
        "import sys, time, pathlib; from ifp_mlx.slicing.unit_file import write_unit_file;"
        "print('ready', flush=True);"
        "write_unit_file(pathlib.Path(sys.argv[1]), on_bytes=lambda *_: time.sleep(0.02))"
    )
    delays = np.random.default_rng(7).uniform(0.0, 0.3, size=10)
    for delay in delays:
        process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (path / UNIT_FILE).exists() or unit_file_is_current(path)
        (path / UNIT_FILE).unlink(missing_ok=True)
    write_unit_file(path)
    assert unit_file_is_current(path)
    left = {entry.name for entry in (path / "ifp").iterdir()}
    assert left <= {"units.safetensors", ".units.lock"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_round_trip(bits: int) -> None:
    codes = np.random.default_rng(3).integers(0, 2**bits, size=(5, 64), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 64 * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [*(("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
     ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)  # fmt: skip
def test_decoded_columns_are_the_dequantized_ones(mode: str, bits: int, group_size: int) -> None:
    weight = mx.random.normal((96, 192))
    packed, scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
    bias = biases[0] if biases else None
    expected = mx.dequantize(packed, scales, bias, group_size, bits, mode=mode)
    columns = mx.array([0, 5, 31, 32, 77, 191])
    codes = unpack_codes(np.array(packed).view(np.uint8), bits)
    by_column = pack_codes(np.ascontiguousarray(codes.T), bits)[np.array(columns)]
    groups = columns // group_size
    found = decode_columns(
        mx.array(by_column.view(np.uint32)),
        mx.take(scales, groups, axis=1),
        None if bias is None else mx.take(bias, groups, axis=1),
        bits=bits,
        mode=mode,
        dtype=mx.float32,
    )
    assert mx.array_equal(found, mx.take(expected, columns, axis=1).astype(mx.float32))

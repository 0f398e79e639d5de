"""Headers of safetensors files, right and wrong."""

import json
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.tensor_files import read_header


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with any header, also one that is wrong."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


def entry(
    start: int = 0, end: int = 8, shape: list[Any] | None = None, dtype: str = "F32"
) -> dict[str, Any]:
    shape = [2] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_read_header_gives_the_ranges_of_the_data(tmp_path: Path) -> None:
    arrays = {"b": mx.arange(6, dtype=mx.int32).reshape(2, 3), "a": mx.array([1.5, 2.5])}
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    tensors = read_header(path)
    content = path.read_bytes()
    for name, dtype in (("a", np.float32), ("b", np.int32)):
        stored = tensors[name]
        raw = content[stored.offset : stored.offset + stored.num_bytes]
        assert np.array_equal(
            np.frombuffer(raw, dtype).reshape(stored.shape), np.array(arrays[name])
        )


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{x", b"", "not valid JSON"),
    "not utf-8": (b"\xff\xfe", b"", "not valid JSON"),
    "deep json": (b"[" * 50_000, b"", "not valid JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "same key twice": (b'{"a":{}, "a":{}}', b"", "not valid JSON"),
    "a list": ([], b"", "not a table"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "metadata are not strings"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, bytes(12), "'b' overlaps"),
    "hole": ({"a": entry(), "b": entry(12, 20)}, bytes(20), "'b' leaves a hole"),
    "beyond the file": ({"a": entry(0, 80, [20])}, bytes(8), "take 80 bytes"),
    "data left over": ({"a": entry()}, bytes(9), "it has 9 for them"),
    "unknown dtype": ({"a": entry(dtype="F4")}, bytes(8), "dtype 'F4', which mlx does not read"),
    "doubles": ({"a": entry(dtype="F64")}, bytes(8), "dtype 'F64', which mlx does not read"),
    "dtype no text": ({"a": entry() | {"dtype": []}}, bytes(8), "has the dtype"),
    "shape and bytes": ({"a": entry(0, 8, [3])}, bytes(8), "does not take 8 bytes"),
    "huge shape": ({"a": entry(0, 8, [2**62, 4])}, bytes(8), "does not take"),
    "negative shape": ({"a": entry(0, 8, [-2])}, bytes(8), r"has the shape \[-2\]"),
    "bool shape": ({"a": entry(0, 4, [True])}, bytes(4), "has the shape"),
    "rank": ({"a": entry(0, 4, [1] * 9)}, bytes(4), "has the shape"),
    "negative offset": ({"a": entry(-8, 0)}, bytes(8), "has the offsets"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8), "has the offsets"),
    "reversed": ({"a": entry(8, 0)}, bytes(8), "does not take"),
    "entry": ({"a": [1]}, b"", "entry of tensor 'a' is not valid"),
    "missing key": ({"a": {"dtype": "F32"}}, b"", "entry of tensor 'a' is not valid"),
    "path": ({"../a": entry()}, bytes(8), "is no tensor name"),
    "absolute path": ({"/etc/a": entry()}, bytes(8), "is no tensor name"),
    "windows path": ({"a\\b": entry()}, bytes(8), "is no tensor name"),
    "control": ({"a\n": entry()}, bytes(8), "is no tensor name"),
    "empty name": ({"": entry()}, bytes(8), "is no tensor name"),
    "long name": ({"a" * 600: entry()}, bytes(8), "is no tensor name"),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_read_header_refuses(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [3, 2**20, 2**40, 2**64 - 1])
def test_header_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": entry()}, bytes(8), length)
    message = "not valid JSON" if length == 3 else f"header length {length} does not fit"
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_mutated_headers_are_read_or_refused_with_one_line(tmp_path: Path) -> None:
    """3,000 damaged headers: never another exception, never memory by an unchecked length."""
    path = tmp_path / "model.safetensors"
    arrays = {f"model.layers.{n}.weight": mx.ones((n, 3), dtype=mx.bfloat16) for n in range(1, 7)}
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    original = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    rng = random.Random(5)
    pieces = [
        b"9999999999999999999",
        b"-1",
        b"null",
        b"1e309",
        b'"F16"',
        b"[",
        b"}",
        b"\x00",
        b"../",
    ]
    refused = multi_line = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    mutated = path.with_name("mutated.safetensors")
    for _ in range(3000):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(header_end)
            match rng.randrange(5):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    damaged[at : at + rng.randint(1, 40)] = b""
                case 2:
                    damaged[at:at] = rng.choice(pieces)
                case 3:
                    damaged[: rng.randint(1, 8)] = rng.randbytes(8)
                case 4:
                    digits = [i for i in range(8, header_end) if 48 <= damaged[i] <= 57]
                    damaged[rng.choice(digits)] = 48 + rng.randrange(10)
        mutated.write_bytes(damaged)
        try:
            tensors = read_header(mutated)
        except CheckpointError as error:
            refused += 1
            multi_line += "\n" in str(error)
        else:  # a change that left a valid file, such as a letter in a name
            assert all(t.offset + t.num_bytes <= len(damaged) for t in tensors.values())
    assert refused > 2000
    assert not multi_line
    grown_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kilobytes < 200_000
    assert time.perf_counter() - started < 60

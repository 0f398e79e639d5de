"""GGUF files that are damaged or hostile."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.errors import CheckpointError

GGUFFactory = Callable[..., Path]


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04" * 10):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(CheckpointError):
            GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(("version", "message"), [(1, "version 1; 2 and 3"), (2**24 * 3, "big-e")])
def test_other_versions_are_refused(tmp_path: Path, version: int, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("counts", [(2**60, 0), (0, 2**60)])
def test_counts_beyond_the_file_are_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    with pytest.raises(CheckpointError, match="more than fit into the file"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95, 0.999])
def test_truncated_file_is_one_line(tiny_gguf: GGUFFactory, tmp_path: Path, kept: float) -> None:
    path = tiny_gguf()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"is damaged: .*; fetch the file again"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_reaches_into_the_next_is_refused(
    tiny_gguf: GGUFFactory, tmp_path: Path
) -> None:
    path = tiny_gguf()
    tensor = GGUFFile(path).tensors["blk.0.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    name = tensor.name.encode()
    entry = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    at = entry + 4 + 8 * len(tensor.shape) + 4  # past the rank, the shape and the type
    struct.pack_into("<Q", content, at, struct.unpack_from("<Q", content, at)[0] - 64)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' overlap.*get another"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mutated_files_are_read_or_refused(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    original = tiny_gguf().read_bytes()
    header_end = original.index(b"blk.2.ffn_up.weight")
    rng = random.Random(9)
    path = tmp_path / "mutated.gguf"
    refused = 0
    for _ in range(600):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(header_end)
            if rng.random() < 0.5:
                damaged[at] = rng.randrange(256)
            else:
                damaged[at : at + 8] = struct.pack("<Q", rng.choice([0, 2**31, 2**63, 2**64 - 1]))
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            sizes = {tensor.offset + tensor.num_bytes for tensor in file.tensors.values()}
            assert max(sizes, default=0) <= len(damaged)
        except CheckpointError:
            refused += 1
    assert refused > 200

"""What tells one checkpoint's values from another's."""

import functools
import hashlib
import json
import os
from pathlib import Path

from ifp_mlx.storage.config_file import read_config, read_json
from ifp_mlx.storage.tensor_files import StoredTensor
from ifp_mlx.storage.weight_files import weight_files
from ifp_mlx.storage.weights import stored_tensors

# Of config.json: says who wrote the file or how to compute, not what the model is.
_UNIDENTIFYING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})
_SAMPLE_BYTES = 512


def fingerprint(path: Path) -> str:
    """Return the identity of a checkpoint's values: 64 hexadecimal digits.

    SHA-256 over config.json, the tensors' names, dtypes and shapes, and samples of each tensor's
    data (its first, middle and last 512 bytes). How the tensors are spread over files, tokenizer
    and generation settings do not matter. Kept until a file changes.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: config.json does not fit.
        ArchitectureError: the family is not in the FFN table.
    """
    return _fingerprint(path, file_states(path))


def file_states(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, size and times of change of the files that hold a checkpoint's values.

    Stricter than the fingerprint, which does not read every byte: it tells a file that was
    written again, even one whose date was set back.

    Raises:
        CheckpointError: there is no config.json, or it is not clear where the weights are.
    """
    config = path / "config.json"
    if not config.exists():
        read_config(path)  # says what is wrong
    files = [config, *weight_files(path)]
    states = [(file, file.stat()) for file in files]
    return tuple((str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in states)


@functools.lru_cache(maxsize=64)
def _fingerprint(path: Path, states: tuple[tuple[str, int, int, int], ...]) -> str:
    read_config(path)
    config = read_json(path / "config.json")
    identifying = {key: value for key, value in config.items() if key not in _UNIDENTIFYING}
    digest = hashlib.sha256(json.dumps(identifying, sort_keys=True).encode())
    tensors = stored_tensors(path)
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors.values():
        by_file.setdefault(tensor.path, []).append(tensor)
    samples = {}
    for file_path, stored in by_file.items():
        with file_path.open("rb") as file:
            for tensor in stored:
                samples[tensor.name] = b"".join(_samples(file.fileno(), tensor))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(samples[name])
    return digest.hexdigest()


def _samples(descriptor: int, tensor: StoredTensor) -> list[bytes]:
    last = max(tensor.num_bytes - _SAMPLE_BYTES, 0)
    size = min(_SAMPLE_BYTES, tensor.num_bytes)
    return [os.pread(descriptor, size, tensor.offset + start) for start in (0, last // 2, last)]

"""Reading checkpoint directories: configuration, weights, tokenizer, identity.

A checkpoint is what mlx-lm and transformers call one: ``config.json``, ``model*.safetensors``,
tokenizer files. Everything is validated before mlx-lm reads it; what does not fit is one clear
``CheckpointError``. Nothing is unpickled, no code of the checkpoint is run.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import CheckpointError, ConfigError
from ifp_mlx.storage.packed_layers import check_packed_layers, check_quantization
from ifp_mlx.storage.tensor_files import StoredTensor, read_header
from ifp_mlx.units.ffn import ffn_layout

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# mlx-lm brings transformers, which take more than a second to import: only loading does so.
# And they advise to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_MAX_JSON_BYTES = 16_000_000
_MAX_SIZE = 2**31
_GPT2_SIZES = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "rope_theta",
    "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "partial_rotary_factor", "logit_scale",
)  # fmt: skip
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
# Of config.json: says who wrote the file or how to compute, not what the model is.
_UNIDENTIFYING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})
_SAMPLE_BYTES = 512
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def read_config(path: Path) -> dict[str, Any]:
    """Return the checked content of a checkpoint's config.json.

    End-of-text ids of generation_config.json replace those of config.json, as in mlx-lm.
    Settings of rotary positions that transformers 5 has under ``rope_parameters`` are there
    under their older names as well, the only ones that mlx-lm reads for most families.

    Raises:
        CheckpointError: ``path`` is no checkpoint directory, or wants to run code of its own.
        ConfigError: config.json lacks a size or has one that is not a positive integer, or a
            setting that is not a number.
        ArchitectureError: the family is not in the FFN table.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a checkpoint directory; ifp pull or ifp convert makes one"
        )
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} has no config.json; it is not a checkpoint that ifp pull or ifp convert made"
        )
    _check_links(path)
    config = _read_json(path / "config.json")
    for key in ("model_file", "auto_map"):
        if key in config:
            raise CheckpointError(
                f"{path}/config.json wants to run Python code of the checkpoint ({key}), which is "
                f"never done; remove {key!r} from it if mlx-lm has this model built in"
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{path}/config.json has no model_type")
    ffn_layout(model_type)
    for key in _GPT2_SIZES if model_type == "gpt2" else _SIZES:
        if key not in config:
            raise ConfigError(f"{path}/config.json has no {key}; convert the model again")
        size = config[key]
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < _MAX_SIZE:
            raise ConfigError(f"{path}/config.json: {key} is {size!r}, not a positive integer")
    for key in _NUMBERS:
        number = config.get(key)
        if number is not None and (type(number) not in (int, float) or not math.isfinite(number)):
            raise ConfigError(f"{path}/config.json: {key} is {number!r}, not a number")
    generation = path / "generation_config.json"
    if generation.exists() and (end_ids := _read_json(generation).get("eos_token_id")):
        config["eos_token_id"] = end_ids
    return _rope_at_top(config) | config


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a checkpoint directory is, from checked headers.

    Raises:
        CheckpointError: there are no weights, only pickled ones, or a file is damaged.
    """
    _check_links(path)
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        pickled = [p.name for ending in ("*.bin", "*.pt", "*.pth") for p in path.glob(ending)]
        if pickled:
            raise CheckpointError(
                f"{path} has only pickled weights ({pickled[0]}), which can run code when read; "
                "get the safetensors version of this model"
            )
        raise CheckpointError(f"{path} has no model*.safetensors; convert or download it again")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in {tensors[name].path.name} and in {file.name}"
                )
            tensors[name] = tensor
    _check_index(path, tensors)
    return tensors


def load_model(
    path: Path, dtype: mx.Dtype | Literal["auto"] | None = None, *, lazy: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return an mlx-lm model and its configuration. Evaluates, unless ``lazy``.

    Args:
        path: a checkpoint directory.
        dtype: None keeps the weights as they are stored. A floating type dequantizes packed
            weights and casts. "auto" is float32 on the CPU, where it is the only fast type, as
            long as that takes at most half of the memory; on a GPU it keeps them as stored.
        lazy: leave the weights on disk until they are used; they are then not checked for NaN.

    Returns:
        The model in evaluation mode, and config.json with ``quantization`` as it now is.

    Raises:
        CheckpointError: damaged or missing weights, weights that disagree with config.json, or
            weights that are not finite.
        ConfigError: config.json lacks what the family needs.
        ArchitectureError: the family is not in the FFN table.
    """
    from mlx_lm.utils import _get_classes, dequantize_model
    from mlx_lm.utils import load_model as load_mlx_model

    def checked_classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], type]:
        model_class, arguments_class = _get_classes(config)

        def build(arguments: Any) -> nn.Module:
            model: nn.Module = model_class(arguments)
            check_packed_layers(model, tensors)
            return model

        return build, arguments_class

    config = read_config(path)
    tensors = stored_tensors(path)
    _check_layer_count(path, config, tensors)
    try:
        if "quantization" in config:
            check_quantization(config["quantization"])
        rope = {key: config[key] for key in _ROPE_KEYS if key in config}
        model, config = load_mlx_model(
            path, lazy=True, model_config=rope, get_model_classes=cast(Any, checked_classes)
        )
    except Exception as error:  # mlx-lm reports a bad checkpoint with whatever comes first
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: config.json and the weights disagree ({reason}); convert the model again"
        ) from error
    if dtype == "auto":
        dtype = automatic_dtype(model)
    if dtype is not None:
        model = dequantize_model(model)
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
        model.set_dtype(dtype)
    if not lazy:
        require_finite(path)
        mx.eval(model.parameters())
    return model, config


def require_finite(path: Path) -> None:
    """Refuse a checkpoint with values that are not numbers. Evaluates, one tensor at a time.

    Looks at the tensors as they are stored: of packed weights only scales and biases are
    floating, which is a tenth of what they become.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or a file is damaged.
    """
    for file in sorted({tensor.path for tensor in stored_tensors(path).values()}):
        arrays = cast(dict[str, mx.array], mx.load(str(file)))
        while arrays:
            name, array = arrays.popitem()
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise CheckpointError(
                    f"{path}: {name} holds values that are not numbers (NaN or infinity); "
                    "download or convert the model again"
                )


def load_tokenizer(path: Path) -> "TokenizerWrapper":
    """Return a checkpoint's tokenizer as mlx-lm wraps it: chat template, detokenizer, end ids.

    Raises:
        CheckpointError: the tokenizer files are missing or damaged.
    """
    from mlx_lm.utils import load_tokenizer as load_mlx_tokenizer

    end_ids = read_config(path).get("eos_token_id")
    try:
        tokenizer: TokenizerWrapper = load_mlx_tokenizer(
            path, {"trust_remote_code": False}, eos_token_ids=end_ids
        )
    except Exception as error:  # transformers and tokenizers raise plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason})") from error
    return tokenizer


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
        CheckpointError: there is no config.json.
    """
    files = [path / "config.json", *sorted(path.glob("model*.safetensors"))]
    if not files[0].exists():
        read_config(path)  # says what is wrong
    states = [(file, file.stat()) for file in files]
    return tuple((str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in states)


@functools.lru_cache(maxsize=64)
def _fingerprint(path: Path, states: tuple[tuple[str, int, int, int], ...]) -> str:
    read_config(path)
    config = _read_json(path / "config.json")
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any such file; download it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def _rope_at_top(config: dict[str, Any]) -> dict[str, Any]:
    """Return what ``rope_parameters`` says and the older keys do not, under the older keys."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    found = {}
    if isinstance(local := rope.get("sliding_attention"), dict):  # Gemma 3: one for each kind
        found["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope.get("full_attention", {})
    found |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        scaling = {key: value for key, value in rope.items() if key not in found}
        found["rope_scaling"] = {"type": kind, **scaling}
    return {
        key: value for key, value in found.items() if value is not None and config.get(key) is None
    }


def _check_links(path: Path) -> None:
    """Refuse links that leave the directory, except those of the hub's own cache layout."""
    root = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for entry in path.iterdir():
        if entry.is_symlink():
            target = entry.resolve()
            if not any(target.is_relative_to(folder) for folder in allowed):
                raise CheckpointError(
                    f"{entry} is a link out of the checkpoint directory; copy the file instead"
                )


def _check_index(path: Path, tensors: dict[str, StoredTensor]) -> None:
    index_path = path / "model.safetensors.index.json"
    if not index_path.exists():
        return
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} has no weight_map; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointError(f"{index_path} names a file outside the checkpoint: {file!r}")
        if not (path / file).exists():
            raise CheckpointError(f"{path} lacks {file}; download the model again")
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{index_path}: tensor {name!r} is not in {file}")


def _check_layer_count(
    path: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]
) -> None:
    numbers = {int(match[1]) for name in tensors if (match := _LAYER_NUMBER.search(name))}
    expected = config["n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"]
    if numbers != set(range(min(expected, len(numbers) + 1))):
        raise CheckpointError(
            f"{path}: config.json says {expected} layers, the weights have {len(numbers)}"
        )


def automatic_dtype(model: nn.Module) -> mx.Dtype | None:
    """Return the type that "auto" computes a model in: see ``load_model``. Evaluates nothing."""
    from mlx_lm.utils import get_total_parameters

    if mx.default_device() != mx.cpu:
        return None
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = int(get_total_parameters(model)) * 4 <= memory_bytes // 2
    return mx.float32 if fits else None

"""Which files of a checkpoint directory hold its weights: what lies beside them does not count.

The index decides, then ``model.safetensors``, then a whole set of shards. What is ambiguous or
not all there is refused by name; nothing is guessed.
"""

import re
from pathlib import Path

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.config_file import check_links, read_json

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MAX_NAMED = 3


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights of a checkpoint directory, in order.

    Raises:
        CheckpointError: there are none, or some are missing, or it is not clear which they are.
    """
    if (path / INDEX).exists():
        names = sorted(set(weight_map(path).values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            or_else = f", or remove {INDEX} if {_SINGLE} is the whole model"
            raise CheckpointError(
                f"{path} lacks {named(missing)}, which {INDEX} names; download the model again"
                f"{or_else if (path / _SINGLE).exists() else ''}"
            )
    else:
        names = _without_index(path)
    files = [path / name for name in names]
    check_links(path, files)
    return files


def weight_map(path: Path) -> dict[str, str]:
    """Return what the index says: tensor name -> file name; empty without an index.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = path / INDEX
    if not index.exists():
        return {}
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for file in content.values():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointError(f"{index} names a file outside the checkpoint: {file!r}")
    return content


def named(names: list[str]) -> str:
    """Return a few of many names, and how many more there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _without_index(path: Path) -> list[str]:
    """Return the names of weight files where no index says them."""
    names = sorted(file.name for file in path.glob("model*.safetensors"))
    if _SINGLE in names:
        return [_SINGLE]
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    counts = {match[2] for match in shards}
    if len(counts) > 1:
        raise CheckpointError(
            f"{path} has shards of several models ({named([match[0] for match in shards])}); "
            "move away those that do not belong to it"
        )
    if counts:
        count = counts.pop()
        wanted = [f"model-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise CheckpointError(
                f"{path} has {len(shards)} of {int(count)} shards; it lacks {named(missing)}; "
                "download the model again"
            )
        return wanted
    if not names:
        raise CheckpointError(_why_none(path))
    return names


def _why_none(path: Path) -> str:
    pickled = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth") for p in path.glob(ending))
    if pickled:
        return (
            f"{path} has only pickled weights ({pickled[0]}), which can run code when read; "
            "get the safetensors version of this model"
        )
    if ggufs := sorted(p.name for p in path.glob("*.gguf")):
        return f"{path} has only GGUF weights; give the file itself to ifp convert: {ggufs[0]}"
    if (path / "adapter_model.safetensors").exists():
        return f"{path} holds an adapter, not a model; merge it into its base model first"
    if others := sorted(p.name for p in path.glob("*.safetensors")):
        to_do = (
            f"rename it to {_SINGLE} if it is the whole model"
            if len(others) == 1
            else f"get {INDEX}, which says what belongs to the model, or a version that has it"
        )
        return f"{path} has no model*.safetensors, but {named(others)}; {to_do}"
    return f"{path} has no model*.safetensors; convert or download it again"

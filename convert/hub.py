"""Checkpoints from the Hugging Face hub: only safetensors, JSON and tokenizer files, verified."""

import dataclasses
import fnmatch
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from ifp_mlx.convert.progress import Progress, folder_growth
from ifp_mlx.errors import DownloadError, IFPError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.files import require_free_disk
from ifp_mlx.units.model_config import ModelConfig

# Pickled weights and Python code are never asked for.
_PATTERNS = [
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE*",
]  # fmt: skip
_CONFIG_FILES = ["config.json", "generation_config.json"]
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_TIMEOUT_SECONDS = 10
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class HubSnapshot:
    """A repository as it is in the hub's cache on this machine.

    Attributes:
        path: a checkpoint directory; its files are links into the hub's cache.
        revision: the commit.
    """

    path: Path
    revision: str


def is_hub_id(text: str) -> bool:
    """Return whether ``text`` has the form of a hub id, ORG/NAME."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith(".")


Look = Callable[[ModelConfig], None]
"""Is shown the configuration of a model before its weights are fetched or read."""


def fetch_from_hub(hub_id: str, progress: Progress, look: Look | None = None) -> HubSnapshot:
    """Return a repository's checkpoint files, downloaded unless the hub's cache has them.

    An interrupted download goes on where it stopped. With ``HF_HUB_OFFLINE`` only the cache is
    asked. Each weight file is compared with the SHA-256 that the hub has published for it.

    Args:
        hub_id: ORG/NAME.
        progress: called while downloading and checking.
        look: called before the weights are fetched.

    Raises:
        ArchitectureError, CheckpointError, ConfigError: ``look`` was given, and the model's
            configuration is none that could be used.
        DownloadError: no such repository, no connection, or a file that is not what was published.
        ResourceError: the disk is full.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    try:
        info = HfApi().model_info(hub_id, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    except OfflineModeIsEnabled:
        return _from_cache(hub_id, "HF_HUB_OFFLINE is set")
    except Exception as error:  # several HTTP libraries' errors, depending on the hub's version
        return _from_cache(hub_id, _reason(error))
    wanted = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        raise DownloadError(
            f"{hub_id} has no safetensors weights; pickled weights are not read, look for another "
            "upload of this model"
        )
    total = sum(file.size or 0 for file in wanted)
    cache = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    require_free_disk(cache, total)
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if look is not None:
            small = snapshot_download(hub_id, revision=info.sha, allow_patterns=_CONFIG_FILES)
            look(read_config(Path(small)))
        with folder_growth(cache / "blobs", "downloading", total, progress):
            path = Path(snapshot_download(hub_id, revision=info.sha, allow_patterns=_PATTERNS))
    except IFPError:
        raise
    except Exception as error:
        raise DownloadError(f"{hub_id} could not be downloaded: {_reason(error)}") from error
    finally:
        if not quiet:
            enable_progress_bars()
    for file in wanted:
        if file.lfs is not None:
            _verify(path / file.rfilename, file.lfs.sha256, progress)
    return HubSnapshot(path, path.name)


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)


def _from_cache(hub_id: str, reason: str) -> HubSnapshot:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(hub_id, allow_patterns=_PATTERNS, local_files_only=True))
    except Exception as error:
        raise DownloadError(
            f"{hub_id} cannot be fetched from the hub ({reason}) and is not in its cache"
        ) from error
    return HubSnapshot(path, path.name)


def _verify(path: Path, published: str, progress: Progress) -> None:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("checking", done, total)
    if digest.hexdigest() != published:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{path.name} has the SHA-256 {digest.hexdigest()}, the hub published {published}; "
            "it was removed, run the command again"
        )


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]

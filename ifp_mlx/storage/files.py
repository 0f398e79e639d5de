"""Files written whole or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from ifp_mlx.errors import ResourceError, UsageError


def write_bytes_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write ``content`` to ``path``: readers see the old file or the new one, never a part.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    works are locked, and only one works at a time.

    Args:
        target: the directory to create.
        overwrite: replace an existing target instead of refusing it.

    Raises:
        UsageError: ``target`` exists and ``overwrite`` is not set, or another run is writing it.
        ResourceError: the parent folder cannot be written.
    """
    target = target.absolute()
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists already; choose another name or pass `overwrite`")
    with contextlib.ExitStack() as locks:
        staging = _stage(target, locks)
        try:
            yield staging
            if target.exists() and not overwrite:
                raise UsageError(f"{target} was made by something else meanwhile; it stays")
            try:
                staging.chmod(0o755)
                _put_in_place(staging, target)
            except OSError as error:
                raise ResourceError(f"cannot write {target}: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _stage(target: Path, locks: contextlib.ExitStack) -> Path:
    """Return a new directory beside ``target``, whose lock ``locks`` then holds.

    Raises:
        UsageError: another run has one.
        ResourceError: the parent folder cannot be written.
    """
    prefix = f".{target.name}.partial-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of two that begin at once, one waits here and then sees the other.
        with _locked_directory(target.parent, wait=True):
            for stale in target.parent.glob(f"{glob.escape(prefix)}*"):
                try:
                    with _locked_directory(stale):
                        shutil.rmtree(stale, ignore_errors=True)
                except BlockingIOError:
                    raise UsageError(
                        f"another process is writing {target}; wait for it, or choose another name"
                    ) from None
                except OSError:  # no directory, or gone
                    continue
            staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
            locks.enter_context(_locked_directory(staging))
            return staging
    except OSError as error:
        raise ResourceError(f"cannot write beside {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked_directory(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a directory; the system releases it when the process ends, however.

    Raises:
        BlockingIOError: another process holds it, and that is not to be waited for.
        OSError: there is no such directory, or it cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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


class FilesInUse:
    """The files that a process uses, for as long as it runs: what clears up leaves them alone.

    The latest few are remembered, which are more than one process answers with at a time.
    """

    _MOST = 8

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}  # descriptors, the latest last
        weakref.finalize(self, _release, self._held, 0)

    def hold(self, path: Path) -> None:
        """Say that a file is in use; one that cannot be opened is passed over."""
        if path in self._held:
            os.close(self._held.pop(path))
        with contextlib.suppress(OSError):
            self._held[path] = os.open(path, os.O_RDONLY)
            fcntl.flock(self._held[path], fcntl.LOCK_SH | fcntl.LOCK_NB)
        _release(self._held, self._MOST)


def _release(held: dict[Path, int], most: int) -> None:
    """Close the oldest descriptors until so many are left."""
    while len(held) > most:
        os.close(held.pop(next(iter(held))))


def is_in_use(path: Path) -> bool:
    """Return whether a process holds a file, be it this one."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or on a disk without locks
        return False
    return False


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

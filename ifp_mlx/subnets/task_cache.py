"""Selected sub-networks on disk, keyed by task description; damaged ones are set aside.

An entry is one safetensors file that holds the selected indices (not the weights: those are a
gather away, and ``compact_store`` keeps them where they are small) and says in its header what they
were selected for. There is no central index: the folder is the cache. Files are replaced whole, two
processes that want one key wait for each other, and an entry that cannot be read is moved aside and
made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import filelock

from ifp_mlx.errors import CacheError, SelectionError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.files import FilesInUse, is_in_use
from ifp_mlx.subnets import compact_store

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 256 * 10**6  # about 2,000 sub-networks of the default model
FORMAT_VERSION = "2"
_SUFFIX = ".safetensors"
_REQUANTIZATION_ERROR = "requantization_error"  # fields of the header
_MEMORY_BYTES = "memory_bytes"
_NUM_EXAMPLES = "num_examples"
_REUSED_TASK = "reused_task"
_REUSE_OVERLAP = "reuse_overlap"
_LOCK_TIMEOUT_S = 120.0
_MIN_PREFIX = 4


def fold_task(task: str) -> str:
    """Return a task description as it is compared: NFC, each run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", task).split())


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """Everything that a selection depends on.

    Attributes:
        task: the description; folded before it is compared.
        base: fingerprint of the checkpoint.
        adapter: fingerprint of the IFP adapter, empty without one.
        selector: its spec, as text.
        selector_version: changes whenever the same input may give other scores.
        kind: name of the kind of units.
        num_kept_units: K.
    """

    task: str
    base: str
    adapter: str
    selector: str
    selector_version: str
    kind: str
    num_kept_units: int

    def fields(self) -> dict[str, str]:
        """Return the fields as text, the task folded: what a file's header holds."""
        values = {name: str(value) for name, value in dataclasses.asdict(self).items()}
        return {**values, "task": fold_task(self.task)}

    @property
    def digest(self) -> str:
        """The file name: a hash of every field."""
        text = json.dumps(self.fields(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Reuse:
    """The sub-network of another task that serves one as well.

    Attributes:
        task: the other one's description.
        overlap: share of units that the two have in common.
    """

    task: str
    overlap: float


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """One cached sub-network, as its file describes it.

    Attributes:
        key: what it was selected for.
        num_units: F of the dense model.
        model_name: the checkpoint's folder name, for people.
        created_s: seconds since 1970.
        last_used_s: seconds since 1970; the file's modification time.
        size_bytes: of the file.
        path: the file.
        requantization_error: relative error of packing its weights again, 0 where that was not
            needed; None if it was never cut.
        memory_bytes: what its model takes as it is computed with here; None if it was never cut.
        num_examples: inputs of the task that selected along with its description.
        reuse: the task whose units it took over, and their overlap; None if it selected itself.
    """

    key: CacheKey
    num_units: int
    model_name: str
    created_s: float
    last_used_s: float
    size_bytes: int
    path: Path
    requantization_error: float | None
    memory_bytes: int | None = None
    num_examples: int = 0
    reuse: "Reuse | None" = None

    def load(self) -> Selection:
        """Return the selection.

        Raises:
            SelectionError: the file is damaged.
        """
        return Selection.load(self.path)[0]


class TaskCache:
    """The sub-networks in one folder, least recently used first out.

    Args:
        folder: created when the first entry is stored.
        max_bytes: entries beyond this are removed when one is added.
    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES):
        self.folder = folder
        self.max_bytes = max_bytes
        self._in_use = FilesInUse()

    @property
    def compact_folder(self) -> Path:
        """Where the weights of sub-networks are kept, for models so small that it is cheap."""
        return self.folder / "weights"

    @contextlib.contextmanager
    def lock(self, key: CacheKey) -> Iterator[None]:
        """Hold one key's lock, so that two processes do not select for it at the same time.

        Where the folder cannot be written nothing will be, and nothing needs the lock.

        Raises:
            CacheError: another process holds the lock for minutes.
        """
        lock = filelock.FileLock(self.folder / f".{key.digest}.lock", timeout=_LOCK_TIMEOUT_S)
        with contextlib.ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock)
            except filelock.Timeout as error:
                raise CacheError(
                    f"another process has held {lock.lock_file} for minutes"
                ) from error
            except OSError as error:
                logger.debug("the cache is not locked: %s", error)
            yield

    def get(self, key: CacheKey) -> tuple[Selection, Reuse | None] | None:
        """Return the selection stored for ``key`` and whose it is, or None. Counts as a use.

        A file that is damaged, or that says it belongs to another key, is moved to the folder's
        ``quarantine`` and reported; the caller makes it again.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            selection, header = Selection.load(path)
            if any(header.get(name) != value for name, value in key.fields().items()):
                raise SelectionError(f"{path} belongs to another task or model")
        except SelectionError as error:
            self._quarantine(path, str(error))
            return None
        with contextlib.suppress(OSError):  # a read-only cache still serves
            os.utime(path)
        self._in_use.hold(path)
        return selection, _reuse(header)

    def put(
        self,
        key: CacheKey,
        selection: Selection,
        model_name: str,
        *,
        num_examples: int = 0,
        reuse: Reuse | None = None,
    ) -> CacheEntry:
        """Store a selection, then remove the least recently used entries beyond the byte budget.

        The weights of a selection that it replaces go, too.

        Raises:
            ResourceError: the disk is full or the folder cannot be written; nothing is left behind.
        """
        header = {
            **key.fields(),
            "format_version": FORMAT_VERSION,
            "model_name": model_name,
            "created_s": repr(time.time()),
            _NUM_EXAMPLES: str(num_examples),
            "num_units": str(selection.num_units),
        }
        if reuse is not None:
            header |= {_REUSED_TASK: reuse.task, _REUSE_OVERLAP: repr(reuse.overlap)}
        path = self._path(key)
        replaced = None
        with contextlib.suppress(SelectionError):  # damaged, or none
            replaced = Selection.load(path)[0] if path.exists() else None
        selection.save(path, header)
        if replaced is not None:
            compact_store.remove(self.compact_folder, replaced)
        self._remove_old_formats()
        self._in_use.hold(path)
        self.prune(self.max_bytes, spare_used=True)
        return self._read_entry(path)

    def note_cut(self, key: CacheKey, requantization_error: float, memory_bytes: int) -> None:
        """Write into an entry, if there is one, what cutting it showed.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
        """
        path = self._path(key)
        if not path.exists():
            return
        with contextlib.suppress(SelectionError):  # damaged since: the next ``get`` reports it
            selection, header = Selection.load(path)
            facts = {
                _REQUANTIZATION_ERROR: repr(requantization_error),
                _MEMORY_BYTES: str(memory_bytes),
            }
            if {**header, **facts} != header:
                selection.save(path, {**header, **facts})
                self._in_use.hold(path)

    def entries(self) -> list[CacheEntry]:
        """Return every readable entry, most recently used first."""
        found = []
        for path in self._files():
            with contextlib.suppress(CacheError):  # verify reports it
                found.append(self._read_entry(path))
        return sorted(found, key=lambda entry: -entry.last_used_s)

    def find(self, text: str) -> CacheEntry:
        """Return the entry whose task is ``text``, or whose key starts with it.

        Raises:
            CacheError: none or several do.
        """
        entries = self.entries()
        task = fold_task(text)
        found = [entry for entry in entries if entry.key.task == task]
        if not found and len(text) >= _MIN_PREFIX:
            found = [entry for entry in entries if entry.path.stem.startswith(text)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise CacheError(f"no cached sub-network for {text!r}; ifp cache list shows them all")
        keys = ", ".join(entry.path.stem[:8] for entry in found)
        raise CacheError(
            f"{text!r} names {len(found)} cached sub-networks; take one key of: {keys}"
        )

    def find_overlapping(
        self, key: CacheKey, selection: Selection, threshold: float
    ) -> tuple[Reuse, Selection] | None:
        """Return the cached sub-network that shares the most units with a selection.

        An entry that turns out to be damaged is moved aside, as in ``get``.

        Args:
            key: what the selection is for; only entries that differ in nothing but the task count.
            selection: what was selected for it.
            threshold: the smallest share of units in common, mean over layers.

        Returns:
            The nearest entry's task and selection, or None if none is that near.
        """
        best: tuple[Reuse, Selection] | None = None
        for entry in self.entries():
            if dataclasses.replace(entry.key, task=key.task) != key:
                continue
            try:
                other = entry.load()
                overlap = selection.mean_overlap(other)
            except SelectionError as error:
                self._quarantine(entry.path, str(error))
                continue
            if overlap >= threshold and (best is None or overlap > best[0].overlap):
                best = Reuse(entry.key.task, overlap), other
        return best

    def remove(self, entry: CacheEntry) -> None:
        """Delete an entry; one that is gone already is no error.

        Raises:
            CacheError: the file cannot be deleted.
        """
        with contextlib.suppress(SelectionError):  # damaged, or gone already
            compact_store.remove(self.compact_folder, entry.load())
        try:
            entry.path.unlink(missing_ok=True)
            entry.path.with_name(f".{entry.path.stem}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(f"cannot delete {entry.path}: {error.strerror}") from error

    def prune(self, max_bytes: int, *, spare_used: bool = False) -> list[CacheEntry]:
        """Remove the least recently used entries until the rest fits, and return them.

        Args:
            max_bytes: budget for all entries together.
            spare_used: those that a process uses stay, whatever the budget says.
        """
        removed = []
        entries = self.entries()
        total_bytes = sum(entry.size_bytes for entry in entries)
        for entry in reversed(entries):
            if total_bytes <= max_bytes:
                break
            if spare_used and is_in_use(entry.path):
                continue
            self.remove(entry)
            total_bytes -= entry.size_bytes
            removed.append(entry)
        return removed

    def verify(self) -> list[str]:
        """Read every entry whole, move damaged ones aside, return one line for each of those."""
        self._remove_old_formats()
        problems = []
        for path in self._files():
            try:
                entry = self._read_entry(path)
                entry.load()
                if entry.key.digest != path.stem:
                    raise CacheError(f"{path} does not hold what its name says")
            except (CacheError, SelectionError) as error:
                self._quarantine(path, str(error))
                problems.append(str(error))
        return problems

    def _path(self, key: CacheKey) -> Path:
        return self.folder / f"{key.digest}{_SUFFIX}"

    def _remove_old_formats(self) -> None:
        """Delete entries of older versions, which are selected anew when they are asked for."""
        for path in self._files():
            with contextlib.suppress(ValueError, OSError):  # damaged ones are verify's to report
                header = load_arrays(path)[1]
                if header.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
                    path.unlink()
                    path.with_name(f".{path.stem}.lock").unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.glob(f"*{_SUFFIX}") if not p.name.startswith("."))

    def _quarantine(self, path: Path, reason: str) -> None:
        target = self.folder / "quarantine" / path.name
        with contextlib.suppress(OSError):  # another process may have moved it first
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        logger.warning("moved a damaged cache entry to %s: %s", target, reason)

    def _read_entry(self, path: Path) -> CacheEntry:
        try:
            _, header = load_arrays(path)  # lazy: the header only
            if header.get("format_version") != FORMAT_VERSION:
                raise CacheError(f"{path} has another format")
            status = path.stat()
            names = [field.name for field in dataclasses.fields(CacheKey)]
            fields = {name: header[name] for name in names}
            error = header.get(_REQUANTIZATION_ERROR)
            return CacheEntry(
                key=CacheKey(**{**fields, "num_kept_units": int(header["num_kept_units"])}),  # type: ignore[arg-type]
                num_units=int(header["num_units"]),
                model_name=header["model_name"],
                created_s=float(header["created_s"]),
                last_used_s=status.st_mtime,
                size_bytes=status.st_size,
                path=path,
                requantization_error=None if error is None else float(error),
                memory_bytes=int(header[_MEMORY_BYTES]) if _MEMORY_BYTES in header else None,
                num_examples=int(header[_NUM_EXAMPLES]),
                reuse=_reuse(header),
            )
        except (ValueError, KeyError, OSError) as error:
            raise CacheError(f"{path} is not a cache entry: {error}") from error


def _reuse(header: dict[str, str]) -> Reuse | None:
    if _REUSED_TASK not in header:
        return None
    return Reuse(header[_REUSED_TASK], float(header[_REUSE_OVERLAP]))

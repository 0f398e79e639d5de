"""Presets: a task under a name of the user's, with how it is answered."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ifp_mlx.errors import UsageError
from ifp_mlx.storage.files import write_bytes_atomically

_FORMAT_VERSION = 1
_NAME = re.compile(r"[\w][\w.-]{0,63}")
_SUFFIX = ".json"


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is said once, and holds whenever the name is given.

    Attributes:
        task: the description.
        keep_ratio: of the units; at most one of the two amounts is given, and none leaves it to
            what ``ifp fit`` found for the task, or to the model's default.
        keep_units: K.
        system_prompt: what the model is told first.
        sampling: fields of ``SamplingOptions`` that were said, by name.
    """

    task: str
    keep_ratio: float | None = None
    keep_units: int | None = None
    system_prompt: str | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Presets:
    """The presets in one folder, a small file each.

    Args:
        folder: made when the first is saved.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of all presets, sorted."""
        return sorted(path.stem for path in self.folder.glob(f"*{_SUFFIX}"))

    def get(self, name: str) -> Preset | None:
        """Return the preset of a name; None if there is none, as for any other text.

        Raises:
            UsageError: its file is damaged.
        """
        if not _NAME.fullmatch(name) or not self._path(name).exists():
            return None
        try:
            content = json.loads(self._path(name).read_text(encoding="utf-8"))
            if content.pop("version") != _FORMAT_VERSION:
                raise ValueError("another version")
            return Preset(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self._path(name)} is damaged ({error}); save {name} again"
            ) from error

    def put(self, name: str, preset: Preset) -> None:
        """Save a preset, in place of one of the same name.

        Raises:
            UsageError: the name has characters that a file's name may not have.
            ResourceError: the folder cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be a preset's name; use letters, digits, dots, dashes and "
                "underscores"
            )
        content = {"version": _FORMAT_VERSION, **dataclasses.asdict(preset)}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_bytes_atomically(self._path(name), text.encode(), mode=0o600)

    def remove(self, name: str) -> None:
        """Forget a preset.

        Raises:
            UsageError: there is none of that name.
        """
        if self.get(name) is None:
            raise UsageError(f"there is no preset {name!r}; there are: {self.listed()}")
        self._path(name).unlink(missing_ok=True)

    def listed(self) -> str:
        """Return the names for a message."""
        return ", ".join(self.names()) or "none yet"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

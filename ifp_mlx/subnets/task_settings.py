"""What ``ifp fit`` found good enough for a task: what is used for it where nothing else is said."""

import dataclasses
import hashlib
import json
from pathlib import Path

from ifp_mlx.storage.files import write_bytes_atomically
from ifp_mlx.subnets.task_cache import fold_task

_FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class TaskSetting:
    """How a task is answered.

    Attributes:
        num_kept_units: K.
        only_reads: the sub-network reads, the whole model writes.
        changed: of 100 tokens, how many differed from the whole model's.
        num_examples: that was measured on.
        num_right: how many of them the user's check found right; None without a check.
        whole_right: how many of the whole model's.
    """

    num_kept_units: int
    only_reads: bool
    changed: float
    num_examples: int
    num_right: int | None = None
    whole_right: int | None = None

    def describe(self) -> str:
        """Return what was measured, for people."""
        text = f"{self.changed:.1f} of 100 tokens differ"
        if self.num_right is not None:
            text += (
                f", {self.num_right} of {self.num_examples} right "
                f"(the whole model {self.whole_right})"
            )
        return text


class TaskSettings:
    """The settings of tasks in one folder, a small file each.

    Args:
        folder: made when the first is stored.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, base: str, task: str) -> TaskSetting | None:
        """Return a task's setting on a model, by the model's fingerprint; None if there is none."""
        try:
            content = json.loads(self._path(base, task).read_text(encoding="utf-8"))
            return TaskSetting(**content["setting"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):  # none, or damaged: as if there were none
            return None

    def put(self, base: str, task: str, setting: TaskSetting) -> None:
        """Keep a setting.

        Raises:
            ResourceError: the folder cannot be written.
        """
        content = {"task": fold_task(task), "setting": dataclasses.asdict(setting)}
        write_bytes_atomically(self._path(base, task), json.dumps(content, indent=1).encode())

    def remove(self, base: str, task: str) -> None:
        """Forget a setting."""
        self._path(base, task).unlink(missing_ok=True)

    def _path(self, base: str, task: str) -> Path:
        text = json.dumps([_FORMAT_VERSION, base, fold_task(task)], ensure_ascii=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

"""Which sub-network answers a request: by the model's name, its task, or its system message."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from ifp_mlx.errors import UsageError
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.messages import system_text
from ifp_mlx.server.requests import GenerationRequest

DENSE_NAME = "dense"
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class SubnetRequest:
    """Which sub-network answers a request.

    Attributes:
        kind: ``task`` selects for a description and caches it, ``dense`` keeps every unit.
        text: the description; empty for the dense model.
        keep: the share of units that a task keeps; None for what the server was started with.
    """

    kind: Literal["task", "dense"]
    text: str = ""
    keep: float | None = None


class ModelCatalog:
    """What may stand in a request's ``model`` field.

    Args:
        base_name: the name of the model.
        tasks: name -> description; each is served as ``base_name:name``.
        default_task: the name of the task that ``base_name`` alone answers with; None for the
            whole model.
        task_from_system: the system message of a request for ``base_name`` is its task.

    Raises:
        UsageError: a task's name or description cannot be used.
    """

    def __init__(
        self,
        base_name: str,
        tasks: Mapping[str, str],
        *,
        default_task: str | None = None,
        task_from_system: bool = False,
    ):
        self.base_name = base_name
        self.tasks = dict(tasks)
        self.default_task = default_task
        self._task_from_system = task_from_system
        for name, description in tasks.items():
            if not _TASK_NAME.fullmatch(name) or name == DENSE_NAME:
                raise UsageError(
                    f"{name!r} cannot name a task; use letters, digits, '.', '_' and '-', "
                    f"and not {DENSE_NAME!r}"
                )
            if not description.strip():
                raise UsageError(f"task {name!r} has no description; write {name}=WHAT IT IS FOR")
        if default_task is not None and default_task not in tasks:
            raise UsageError(f"there is no task {default_task!r} to answer with by default")
        self._default = SubnetRequest("dense")
        if default_task is not None:
            self._default = SubnetRequest("task", self.tasks[default_task])

    @property
    def names(self) -> list[str]:
        """Every name that a request may give, the model's own first."""
        return [self.base_name, *(f"{self.base_name}:{n}" for n in (*self.tasks, DENSE_NAME))]

    def choose(self, request: GenerationRequest) -> SubnetRequest:
        """Return the sub-network that a request asks for.

        Raises:
            APIError: 404 for an unknown name, 400 for a name that has a task besides ``task``, or
                for ``keep`` where the whole model answers.
        """
        choice = self._choose(request)
        if request.keep is None:
            return choice
        if choice.kind == "dense":
            raise APIError(
                400,
                "keep needs a task: the whole model answers here, with every unit",
                param="keep",
            )
        return dataclasses.replace(choice, keep=request.keep)

    def _choose(self, request: GenerationRequest) -> SubnetRequest:
        name = request.model or self.base_name
        if name not in self.names:
            raise APIError(
                404,
                f"no model {name!r} here; there are: {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        suffix = name[len(self.base_name) + 1 :]
        if request.task is not None and suffix:
            raise APIError(
                400,
                f"{name!r} has its sub-network already; leave out task, or ask for "
                f"{self.base_name!r}",
                param="task",
            )
        if request.task is not None:
            return SubnetRequest("task", request.task)
        if suffix == DENSE_NAME:
            return SubnetRequest("dense")
        if suffix:
            return SubnetRequest("task", self.tasks[suffix])
        if self._task_from_system and (task := system_text(request.messages or ())):
            return SubnetRequest("task", task)
        return self._default

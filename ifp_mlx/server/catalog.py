"""Model names as clients see them: the model itself, one name a task, and the dense model."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from ifp_mlx.errors import UsageError
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.requests import GenerationRequest

DENSE_NAME = "dense"
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class SubnetRequest:
    """Which sub-network answers a request.

    Attributes:
        kind: ``task`` selects for a description and caches it, ``prompt`` for one text, ``dense``
            keeps every unit.
        text: the description or the text; empty for the dense model.
    """

    kind: Literal["task", "prompt", "dense"]
    text: str = ""


class ModelCatalog:
    """What may stand in a request's ``model`` field.

    Args:
        base_name: the name of the model; it selects for each conversation's first message.
        tasks: name -> description; each is served as ``base_name:name``.

    Raises:
        UsageError: a task's name or description cannot be used.
    """

    def __init__(self, base_name: str, tasks: Mapping[str, str]):
        self.base_name = base_name
        self.tasks = dict(tasks)
        for name, description in tasks.items():
            if not _TASK_NAME.fullmatch(name) or name == DENSE_NAME:
                raise UsageError(
                    f"{name!r} cannot name a task; use letters, digits, '.', '_' and '-', "
                    f"and not {DENSE_NAME!r}"
                )
            if not description.strip():
                raise UsageError(f"task {name!r} has no description; write {name}=WHAT IT IS FOR")

    @property
    def names(self) -> list[str]:
        """Every name that a request may give, the model's own first."""
        return [self.base_name, *(f"{self.base_name}:{n}" for n in (*self.tasks, DENSE_NAME))]

    def choose(self, request: GenerationRequest) -> SubnetRequest:
        """Return the sub-network that a request asks for.

        Raises:
            APIError: 404 for an unknown name, 400 for a name that has a task besides ``task``.
        """
        if request.model not in self.names:
            raise APIError(
                404,
                f"no model {request.model!r} here; there are: {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        suffix = request.model[len(self.base_name) + 1 :]
        if request.task is not None and suffix:
            raise APIError(
                400,
                f"{request.model!r} has its sub-network already; leave out task, or ask for "
                f"{self.base_name!r}",
                param="task",
            )
        if request.task is not None:
            return SubnetRequest("task", request.task)
        if suffix == DENSE_NAME:
            return SubnetRequest("dense")
        if suffix:
            return SubnetRequest("task", self.tasks[suffix])
        return SubnetRequest("prompt", request.first_user_text)

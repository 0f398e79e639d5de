"""What the page shows of the tasks: what they take, what they share, and their pictures."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ifp_mlx.errors import IFPError
from ifp_mlx.pictures.subnetwork import DEFAULT_WIDTH, WIDTHS, Subject, describe, draw
from ifp_mlx.pictures.unit_map import Shares
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.catalog import DENSE_NAME, ModelCatalog, SubnetRequest
from ifp_mlx.server.content import Content
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.seen_subnets import SubnetFacts

Query = Mapping[str, Sequence[str]]
"""The fields of a URL, or of a body."""

_MAX_DESCRIPTIONS = 8
_DENSE = SubnetRequest("dense")
_PICTURE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Route:
    """What answers a path.

    Attributes:
        method: of HTTP.
        answer: takes the fields of a request and a check of the client.
    """

    method: str
    answer: Callable[[Query, Callable[[], None]], Content]


class TaskViews:
    """Answers questions about tasks. A task is a name that is served, or a description.

    ``dense`` is the whole model.

    Args:
        engine: knows the sub-networks.
        catalog: the names that are served.
        time_limit_s: for selecting what was not selected yet.
    """

    def __init__(self, engine: Engine, catalog: ModelCatalog, time_limit_s: float):
        self._engine = engine
        self._catalog = catalog
        self._time_limit_s = time_limit_s

    @property
    def routes(self) -> dict[str, Route]:
        """What answers which path; each takes the request's fields and a check of the client."""
        return {
            "/ifp/tasks": Route("GET", self.tasks),
            "/ifp/units": Route("GET", self.units),
            "/ifp/picture": Route("GET", self.picture),
            # Selecting takes the model's time: web pages of others can make a browser GET anything.
            "/ifp/select": Route("POST", self.select),
        }

    def select(self, query: Query, check: Callable[[], None]) -> Content:
        """Select for the description in the field ``task``; return what is told of the task.

        Raises:
            APIError: 400 without one, 503 when the model is busy for long.
            IFPError: it cannot be selected for.
        """
        task = _task_of(query)
        facts = self._engine.facts(self._request(task), self._time_limit_s, check)
        return _json(self._task(task, facts))

    def tasks(self, query: Query, check: Callable[[], None]) -> Content:
        """Return every served task, and those selected ones in the fields ``task``, as JSON.

        Raises:
            APIError: 400 for too many descriptions, 503 when the model is busy for long.
        """
        described = list(dict.fromkeys(query.get("task", ())))
        if len(described) > _MAX_DESCRIPTIONS:
            message = f"describe at most {_MAX_DESCRIPTIONS} tasks at a time"
            raise APIError(400, message, param="task")
        names = [*self._catalog.tasks, *(d for d in described if d not in self._catalog.tasks)]
        known = {name: self._facts_or_reason(name, check) for name in names}
        maps = {name: facts.units for name, facts in known.items() if not isinstance(facts, str)}
        whole = next((facts for facts in known.values() if not isinstance(facts, str)), None)
        if whole is None:
            whole = self._engine.facts(_DENSE, self._time_limit_s, check)
        gauges = self._engine.gauges()
        base = self._catalog.base_name
        return _json(
            {
                "model": base,
                "default": self._catalog.default_task or DENSE_NAME,
                "unit_label": whole.label,
                "num_units": whole.units.num_units,
                "is_mixture": whole.is_mixture,
                "tasks": [self._task(name, facts) for name, facts in known.items()],
                "whole": {
                    "id": DENSE_NAME,
                    "model": f"{base}:{DENSE_NAME}",
                    "num_kept_units": whole.units.num_units,
                    "bytes": whole.whole_bytes,
                    "tokens_per_s": self._engine.seen.speed(_DENSE),
                },
                "memory_bytes": gauges["memory_bytes"][1](),
                "memory_peak_bytes": gauges["memory_peak_bytes"][1](),
                "overlaps": [
                    [round(one.overlap(other), 4) for other in maps.values()]
                    for one in maps.values()
                ],
                "overlap_names": list(maps),
            }
        )

    def units(self, query: Query, check: Callable[[], None]) -> Content:
        """Return a task's units layer by layer, and how many another one shares, as JSON."""
        one, other = self._subjects(query, check)
        layers = []
        shared = None if other is None else one.units.shared(other.units)
        for position, layer in enumerate(one.units.layers):
            row = {"layer": layer + 1, "kept": one.units.num_kept_units}
            if shared is not None:
                row["shared"] = int(shared[position])
            layers.append(row)
        return _json({"description": describe(one, other), "layers": layers})

    def picture(self, query: Query, check: Callable[[], None]) -> Content:
        """Return a task's picture, ``width`` pixels wide, as SVG.

        With ``routed`` that of a mixture shows where the latest tokens went.
        """
        one, other = self._subjects(query, check)
        if _one(query, "routed") and (shares := self._routed(query)) is not None:
            one = Subject(one.name, one.units.scored(shares), "more of the latest tokens")
        given = _one(query, "width") or str(DEFAULT_WIDTH)
        if not given.isascii() or not given.isdigit():
            raise APIError(400, "width must be a number of pixels", param="width")
        width = min(max(int(given[:6]), WIDTHS[0]), WIDTHS[1])
        raw = draw(one, other, width=width).encode()
        return Content("image/svg+xml", raw, _PICTURE_HEADERS)

    def _subjects(self, query: Query, check: Callable[[], None]) -> tuple[Subject, Subject | None]:
        one, against = self._subject(_task_of(query), check), _one(query, "against")
        return one, None if against is None else self._subject(against, check)

    def _subject(self, task: str, check: Callable[[], None]) -> Subject:
        return Subject(task, self._facts(task, check).units)

    def _routed(self, query: Query) -> Shares | None:
        return self._engine.seen.routed(self._request(_task_of(query)))

    def _request(self, task: str) -> SubnetRequest:
        if task == DENSE_NAME:
            return _DENSE
        return SubnetRequest("task", self._catalog.tasks.get(task, task))

    def _facts(self, task: str, check: Callable[[], None]) -> SubnetFacts:
        request = self._request(task)
        is_served = task in self._catalog.tasks or request is _DENSE
        if not is_served and self._engine.seen.get(request) is None:
            raise APIError(
                404,
                "nothing is selected for this task; POST it to /ifp/select",
                code="not_selected",
            )
        return self._engine.facts(request, self._time_limit_s, check)

    def _facts_or_reason(self, task: str, check: Callable[[], None]) -> SubnetFacts | str:
        try:
            return self._facts(task, check)
        except IFPError as error:
            return str(error)
        except APIError as error:
            if error.status != 404:
                raise
            return error.message

    def _task(self, name: str, facts: SubnetFacts | str) -> dict[str, Any]:
        description = self._catalog.tasks.get(name)
        task: dict[str, Any] = {"id": name, "description": description or name}
        if description is not None:
            task["model"] = f"{self._catalog.base_name}:{name}"
        if isinstance(facts, str):
            return {**task, "error": facts}
        return {
            **task,
            "num_kept_units": facts.units.num_kept_units,
            "bytes": facts.num_bytes,
            "selector": facts.selector,
            "tokens_per_s": self._engine.seen.speed(self._request(name)),
        }


def _task_of(query: Query) -> str:
    task = _one(query, "task")
    if task is None:
        raise APIError(400, "say which task", param="task")
    return task


def _one(query: Query, name: str) -> str | None:
    return next(iter(query.get(name, ())), None)


def _json(body: dict[str, Any]) -> Content:
    return Content("application/json", json.dumps(body).encode(), {"Cache-Control": "no-store"})

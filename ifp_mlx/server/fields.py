"""The fields of a request's body: read leniently where clients differ, refused where it matters.

A field that is ``null`` is one that is not there. 8.0 is 8. Whatever cannot be meant is an
``APIError`` with status 400 that names the field.
"""

import json
import math
from typing import Any

from ifp_mlx.server.api_error import APIError

_MAX_DEPTH = 100  # of nested JSON: what walks it later must not run out of stack


def parse_json(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        APIError: 400, not UTF-8, not JSON, not an object, or nested too deeply.
    """
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise APIError(400, "the body is not UTF-8; encode it so", code="invalid_utf8") from error
    except (ValueError, RecursionError) as error:
        raise APIError(400, "the body is not valid JSON", code="invalid_json") from error
    if not isinstance(body, dict):
        raise APIError(400, "the body must be a JSON object", code="invalid_json")
    if _is_deep(body):
        message = f"the body is nested more than {_MAX_DEPTH} levels deep"
        raise APIError(400, message, code="invalid_json")
    return body


def wrong(name: str, expected: str) -> APIError:
    """Return the error for a field that is not what it must be."""
    return APIError(400, f"{name} must be {expected}", param=name, code="invalid_value")


def unsupported(name: str, message: str) -> APIError:
    """Return the error for a field that would change the answer, which this server cannot do."""
    return APIError(400, message, param=name, code="unsupported_parameter")


def text(value: Any, name: str) -> str:
    """Return a string, which may be empty."""
    if value is None:
        raise APIError(400, f"{name} is missing", param=name, code="missing_parameter")
    if not isinstance(value, str):
        raise wrong(name, "a string")
    encodable(value, name)
    return value


def optional_text(body: dict[str, Any], name: str) -> str | None:
    """Return a string that says something, None where there is none."""
    value = body.get(name)
    return None if value is None or value == "" else text(value, name)


def encodable(value: Any, name: str) -> Any:
    """Return a JSON value that can be written again.

    Its strings must be text: JSON can spell half a surrogate pair.
    """
    if _is_deep(value):
        raise wrong(name, f"nested at most {_MAX_DEPTH} levels deep")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise APIError(400, f"{name} holds half a surrogate pair", param=name) from error
    return value


def items(body: dict[str, Any], name: str) -> list[Any]:
    """Return a list, empty where there is none."""
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise wrong(name, "a list")
    return value or []


def json_object(body: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object, empty where there is none."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise wrong(name, "an object")
    return encodable(value, name) if value else {}


def boolean(body: dict[str, Any], name: str, *, default: bool = False) -> bool:
    """Return true or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, "true or false")
    return value


def integer(
    body: dict[str, Any], name: str, default: int, low: int, high: int, *, hint: str = ""
) -> int:
    """Return an integer within a range; ``hint`` is added to what the error says it must be."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(name, f"an integer from {low} to {high}{hint}")
    return value


def number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    """Return a number within a range."""
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or math.isnan(value):
        raise wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def _is_deep(body: Any) -> bool:
    level = [body]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")

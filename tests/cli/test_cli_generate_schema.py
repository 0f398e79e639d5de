"""``ifp generate --schema``: the answer is JSON that fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.mark.parametrize("flags", [[], ["--temp", "1.5", "--seed", "3"], ["--raw"]])
def test_the_answer_fits_the_schema(
    ifp: Run, small_model: Path, schema: Path, flags: list[str]
) -> None:
    outcome = ifp(
        "generate", "a pet", "--model", small_model, "--dense", "--schema", schema, "-m", "60",
        *flags,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    answer = json.loads(outcome.stdout)
    assert set(answer) == {"name", "kind"}
    assert answer["kind"] in ("cat", "dog")


def test_json_output_holds_the_answer(ifp: Run, small_model: Path, schema: Path) -> None:
    outcome = ifp(
        "generate", "a pet", "--model", small_model, "--dense", "--schema", schema, "--json",
        "-m", "60",
    )  # fmt: skip
    assert json.loads(json.loads(outcome.stdout)["answer"])["kind"] in ("cat", "dog")


def test_an_answer_without_room_is_said_to_be_incomplete(
    ifp: Run, small_model: Path, schema: Path
) -> None:
    outcome = ifp(
        "generate", "a pet", "--model", small_model, "--dense", "--schema", schema, "-m", "5"
    )
    assert "allow more with --max-tokens" in outcome.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"type": "spaceship"}', "the schema cannot be enforced"),
    ],
)
def test_what_is_no_schema_is_one_line(
    ifp: Run, small_model: Path, tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    outcome = ifp("generate", "a pet", "--model", small_model, "--dense", "--schema", path)
    assert outcome.code == 2
    assert says in outcome.stderr
    assert "Traceback" not in outcome.stderr

"""Keys and values in a file: the same words as without, and never those of another sub-network."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifp_mlx.storage.arrays import load_arrays

Run = Callable[..., Any]
TEXT = "Say all the words that you know, one after another, and then stop."


def num_kept_tokens(file: Path) -> int:
    """Return of how many tokens a file holds keys and values."""
    return len(json.loads(load_arrays(file)[1]["0.token_ids"]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept.safetensors"


@pytest.fixture
def answer(ifp: Run, small_model: Path, file: Path) -> Callable[..., dict[str, Any]]:
    """Return a function: prompt -> what ``ifp generate --json`` says, with the file in use."""

    def run(prompt: str = TEXT, *flags: str, kept: bool = True) -> dict[str, Any]:
        arguments = ["generate", prompt, "--model", small_model, "--task", "words", "--json"]
        arguments += ["--keep-units", "64", "--max-tokens", "9", *flags]
        outcome = ifp(*arguments, *(["--prompt-cache-file", file] if kept else []))
        assert outcome.code == 0, outcome.stderr
        return {**json.loads(outcome.stdout), "stderr": outcome.stderr}

    return run


def test_second_run_reads_only_the_last_token(answer: Callable[..., dict[str, Any]]) -> None:
    expected = answer(kept=False)
    first, second = answer(), answer()
    assert first["answer"] == second["answer"] == expected["answer"]
    assert first["cached_prompt_tokens"] == 0
    assert second["cached_prompt_tokens"] == second["prompt_tokens"] - 1


def test_a_longer_prompt_reads_only_what_is_new(answer: Callable[..., dict[str, Any]]) -> None:
    longer = f"{TEXT} Then begin again."
    expected = answer(longer, kept=False)
    answer()
    found = answer(longer)
    assert found["answer"] == expected["answer"]
    # One token a byte: all up to the end of the shorter text, and the template before it.
    assert len(TEXT) <= found["cached_prompt_tokens"] < found["prompt_tokens"] - 10


def test_quantized_keys_and_values_are_kept_as_well(
    ifp: Run, tiny_checkpoint: Callable[..., Path], file: Path
) -> None:
    model = tiny_checkpoint(hidden_size=256)
    arguments = ["generate", TEXT, "--model", model, "--task", "words", "--keep-units", "64"]
    arguments += ["--json", "--max-tokens", "5", "--kv-bits", "8", "--prompt-cache-file", file]
    first, second = (json.loads(ifp(*arguments).stdout) for _ in range(2))
    assert first["answer"] == second["answer"]
    assert second["cached_prompt_tokens"] == second["prompt_tokens"] - 1


@pytest.mark.parametrize(
    "flags",
    [["--task", "something quite different"], ["--keep-units", "128"], ["--no-cache", "--dense"]],
    ids=["task", "amount", "dense"],
)
def test_another_sub_network_does_not_use_it(
    ifp: Run, small_model: Path, file: Path, answer: Callable[..., dict[str, Any]], flags: list[str]
) -> None:
    answer()
    arguments = ["generate", TEXT, "--model", small_model, "--json", "--max-tokens", "9"]
    expected = json.loads(ifp(*arguments, *flags).stdout)
    outcome = ifp(*arguments, *flags, "--prompt-cache-file", file)
    assert f"{file} belongs to another sub-network; reading the prompt anew" in outcome.stderr
    found = json.loads(outcome.stdout)
    assert (found["answer"], found["cached_prompt_tokens"]) == (expected["answer"], 0)
    again = json.loads(ifp(*arguments, *flags, "--prompt-cache-file", file).stdout)
    assert again["cached_prompt_tokens"] == again["prompt_tokens"] - 1


@pytest.mark.parametrize("damage", ["truncated", "text", "a model", "other class", "fewer tokens"])
def test_what_is_damaged_or_something_else_is_refused_and_stays(
    ifp: Run,
    small_model: Path,
    file: Path,
    answer: Callable[..., dict[str, Any]],
    damage: str,
) -> None:
    answer()
    content = file.read_bytes()
    arrays, header = load_arrays(file)
    mx.eval(arrays)
    if damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "text":
        file.write_text("my notes")
    elif damage == "a model":
        file.write_bytes((small_model / "model.safetensors").read_bytes())
    elif damage == "other class":
        mx.save_safetensors(str(file), arrays, {**header, "1.0": "BatchKVCache"})
    else:
        mx.save_safetensors(str(file), arrays, {**header, "0.token_ids": "[1, 2]"})
    before = file.read_bytes()
    arguments = ["generate", TEXT, "--model", small_model, "--task", "words", "--keep-units", "64"]
    outcome = ifp(*arguments, "--prompt-cache-file", file)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "is damaged or no --prompt-cache-file" in outcome.stderr
    assert file.read_bytes() == before


def test_paths_that_cannot_be_written_are_refused_before_loading(ifp: Run, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere" / "x.safetensors", "cannot be written there"),
        (tmp_path / "x.bin", "must end in .safetensors"),
    ):
        for command in (["generate", "hi"], ["chat"]):
            outcome = ifp(*command, "--model", "none", "--prompt-cache-file", path, stdin="hi\n")
            assert outcome.code == 2
            assert message in outcome.stderr


def test_a_full_disk_leaves_the_answer_and_the_old_file(
    ifp: Run,
    small_model: Path,
    file: Path,
    answer: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer()
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise RuntimeError("[write] Unable to write: No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    arguments = ["generate", "other", "--model", small_model, "--task", "words"]
    outcome = ifp(*arguments, "--keep-units", "64", "--prompt-cache-file", file)
    assert outcome.code == 1
    assert outcome.stdout
    assert "No space left" in outcome.stderr
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.glob(".kept*")] == []


def test_the_file_is_its_owner_s_alone(answer: Callable[..., dict[str, Any]], file: Path) -> None:
    answer()
    assert os.stat(file).st_mode & 0o777 == 0o600


def test_a_chat_leaves_its_keys_for_the_next_one(ifp: Run, small_model: Path, file: Path) -> None:
    arguments = ["chat", "--model", small_model, "--task", "words", "--keep-units", "64"]
    arguments += ["--max-tokens", "6", "--session", "one"]
    plain = ifp(*arguments[:-1], "two", stdin="first\nsecond\n").stdout.splitlines()
    first = ifp(*arguments, "--prompt-cache-file", file, stdin="first\n")
    assert first.code == 0
    held = num_kept_tokens(file)
    second = ifp(*arguments, "--prompt-cache-file", file, stdin="second\n")
    assert [*first.stdout.splitlines(), *second.stdout.splitlines()] == plain
    assert num_kept_tokens(file) > held


def test_a_chat_of_several_sub_networks_does_not_touch_the_file(
    ifp: Run, small_model: Path, file: Path
) -> None:
    arguments = ["chat", "--model", small_model, "--task", "words", "--keep-units", "64"]
    arguments += ["--max-tokens", "6", "--no-save", "--prompt-cache-file", file]
    outcome = ifp(*arguments, stdin="first\n/task numbers\nsecond\n")
    assert not file.exists()
    assert "several sub-networks took part" in outcome.stderr

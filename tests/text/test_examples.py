"""Training text: bad files give one clear error or are skipped and counted; good ones, examples."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import ConfigError, DataError, TrainingError
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.text.examples import ExampleRules, ExampleSet, tokenise_files
from ifp_mlx.text.records import (
    MAX_LINE_BYTES,
    BadLines,
    check_document,
    check_prompt_response,
    read_records,
)
from ifp_mlx.training.config import StageConfig, TrainingConfig, config_from_dict, load_config
from ifp_mlx.training.schedule import example_weights, make_batch, make_schedule

_GOOD = {"prompt": "Add 1 and 2", "response": "3", "source": "sums"}


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> ChatTokenizer:
    return load_tokenizer(tiny_checkpoint())


def _write(path: Path, *records: Any) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


_BAD_LINES = {
    "no response": ({"prompt": "x"}, "field 'response' is missing or empty"),
    "empty prompt": ({"prompt": "  ", "response": "y"}, "field 'prompt' is missing or empty"),
    "number": ({"prompt": 3, "response": "y"}, "field 'prompt' is missing or empty"),
    "not json": (b"{oops", "not JSON"),
    "list": ([1, 2], "not a JSON object"),
    "latin-1": ('{"prompt": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    "long line": (b'"' + b"x" * (MAX_LINE_BYTES + 5) + b'"', f"line over {MAX_LINE_BYTES} bytes"),
    "no user": ({"messages": [{"role": "assistant", "content": "hi"}]}, "needs a user message"),
    "odd role": ({"messages": [{"role": "robot", "content": "hi"}]}, "has the role 'robot'"),
    "no content": ({"messages": [{"role": "user"}]}, "a message has no content"),
    "no messages": ({"messages": []}, "not a list of messages"),
}


@pytest.mark.parametrize("name", _BAD_LINES)
def test_bad_line_is_named_with_file_and_line(name: str, tmp_path: Path) -> None:
    line, reason = _BAD_LINES[name]
    path = _write(tmp_path / "sums.jsonl", _GOOD, line, _GOOD)
    with pytest.raises(DataError, match=f"sums.jsonl:2: .*{reason}"):
        list(read_records(path, check_prompt_response, BadLines()))


@pytest.mark.parametrize("name", _BAD_LINES)
def test_bad_line_is_skipped_and_counted(name: str, tmp_path: Path) -> None:
    line, _ = _BAD_LINES[name]
    bad = BadLines(skip=True)
    path = _write(tmp_path / "sums.jsonl", _GOOD, line, _GOOD)
    assert len(list(read_records(path, check_prompt_response, bad))) == 2
    assert bad.counts.total() == 1


def test_empty_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.jsonl holds no usable record"):
        list(read_records(tmp_path / "empty.jsonl", check_document, BadLines()))
    with pytest.raises(DataError, match=r"gone.jsonl cannot be read"):
        list(read_records(tmp_path / "gone.jsonl", check_document, BadLines()))
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 50)[:-20])
    with pytest.raises(DataError, match=r"cut.jsonl.xz cannot be read"):
        list(read_records(tmp_path / "cut.jsonl.xz", check_document, BadLines()))


def test_prompt_and_response_become_an_example(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "sums.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(_GOOD).encode()))
    examples = tokenise_files([path], [], tokenizer, ExampleRules(), BadLines())
    tokens, target = examples.example(0)
    prompt = chat_ids(tokenizer, [{"role": "user", "content": "Add 1 and 2"}])
    assert tokens[: len(prompt)].tolist() == prompt
    assert examples.source(0).tolist() == prompt
    assert tokens[target].tolist() == [*tokenizer.encode("3"), tokenizer.eos_token_id]
    assert examples.domain_names == ("sums",)


def test_conversation_selects_by_its_first_human_message(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    path = _write(tmp_path / "talk.jsonl", {"messages": messages})
    examples = tokenise_files([path], [], tokenizer, ExampleRules(), BadLines())
    tokens, target = examples.example(0)
    assert examples.source(0).tolist() == chat_ids(tokenizer, messages[:1])
    end = [tokenizer.eos_token_id]
    assert tokens[target].tolist() == [
        *tokenizer.encode("two"),
        *end,
        *tokenizer.encode("four"),
        *end,
    ]
    assert tokens[: len(tokens) - 5].tolist() == chat_ids(tokenizer, messages[:3])


def test_document_chunks_select_for_the_next(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    text = "".join(chr(97 + i % 26) for i in range(80))
    path = _write(tmp_path / "prose.jsonl", {"text": text}, {"text": "too short"})
    rules = ExampleRules(chunk_tokens=16, num_chunks=3)
    examples = tokenise_files([], [path], tokenizer, rules, BadLines())
    # 80 tokens: a window of three chunks gives two examples, a rest of two chunks one.
    assert examples.lengths().tolist() == [32, 48, 32]
    ids = tokenizer.encode(text)
    for index, (start, source) in enumerate([(0, 0), (0, 16), (48, 48)]):
        tokens, target = examples.example(index)
        assert tokens.tolist() == ids[start : start + len(tokens)]
        assert target.sum() == 16
        assert target[-16:].all()
        assert examples.source(index).tolist() == ids[source : source + 16]


def test_documents_too_short_for_a_window_are_counted(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = _write(tmp_path / "lm_a.jsonl", {"text": "ab" * 40}, {"text": "short"})
    bad = BadLines()
    tokenise_files([], [path], tokenizer, ExampleRules(chunk_tokens=16, num_chunks=3), bad)
    assert bad.counts == {"document shorter than two chunks": 1}


def test_long_prompts_and_excluded_sources_are_left_out(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    long = {"prompt": "x" * 900, "response": "y"}
    path = _write(tmp_path / "sums.jsonl", _GOOD, long, {**_GOOD, "source": "t0:news"})
    bad = BadLines()
    rules = ExampleRules(max_tokens=128, excluded_sources=("t0:",))
    assert len(tokenise_files([path], [], tokenizer, rules, bad)) == 1
    assert bad.counts == {"prompt leaves no room for an answer": 1, "excluded source": 1}
    with pytest.raises(DataError, match="no training example is left"):
        tokenise_files([path], [], tokenizer, ExampleRules(max_tokens=4), bad)


def test_examples_survive_the_disk(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = _write(tmp_path / "sums.jsonl", _GOOD, _GOOD)
    examples = tokenise_files([path], [], tokenizer, ExampleRules(), BadLines())
    examples.save(tmp_path / "set")
    loaded = ExampleSet.load(tmp_path / "set")
    assert loaded.example(1)[0].tolist() == examples.example(1)[0].tolist()
    assert loaded.domain_names == ("sums",)
    with pytest.raises(DataError, match="no folder of tokenised examples"):
        ExampleSet.load(tmp_path / "gone")


@pytest.fixture
def mixed(tmp_path: Path, tokenizer: ChatTokenizer) -> ExampleSet:
    sums = [{"prompt": f"Add {i} and {i}", "response": str(2 * i)} for i in range(40)]
    documents = [{"text": "word " * 40} for _ in range(10)]
    return tokenise_files(
        [_write(tmp_path / "sums.jsonl", *sums)],
        [_write(tmp_path / "prose.jsonl", *documents)],
        tokenizer,
        ExampleRules(chunk_tokens=32, num_chunks=2),
        BadLines(),
    )


def _config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "keep_units": (64, 128),
            "stages": (StageConfig(4000, 0.5), StageConfig(4000, 0.0)),
            "batch_tokens": 512,
            **changes,
        }
    )


def test_schedule_ignores_the_masks_and_fills_its_stages(mixed: ExampleSet) -> None:
    steps = make_schedule(mixed, _config(mask="ifp"))
    other = make_schedule(mixed, _config(mask="none"))
    assert [s.examples.tolist() for s in steps] == [s.examples.tolist() for s in other]
    assert [s.keep_units for s in steps] == [s.keep_units for s in other]
    assert {s.keep_units for s in steps} == {64, 128}
    documents = mixed.domains == mixed.domain_names.index("prose")
    for stage, share in ((0, 0.5), (1, 0.0)):
        seen = np.concatenate([s.examples for s in steps if s.stage == stage])
        lengths = mixed.lengths()[seen]
        assert lengths.sum() >= 4000
        found = lengths[documents[seen]].sum() / lengths.sum()
        assert found == pytest.approx(share, abs=0.1)


def test_schedule_needs_the_text_that_a_stage_asks_for(mixed: ExampleSet) -> None:
    import dataclasses

    only = dataclasses.replace(mixed, document_domains=())
    with pytest.raises(TrainingError, match="a stage needs a kind of text"):
        make_schedule(only, _config())


def test_batch_looks_at_targets_alone(mixed: ExampleSet) -> None:
    indices = np.array([0, 41, 3])
    weights = example_weights(mixed, indices)
    batch = make_batch(mixed, indices, weights)
    assert batch.weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    ids, positions = np.array(batch.token_ids), np.array(batch.positions)
    used = np.array(batch.weights) > 0
    wanted = []
    for row, index in enumerate(indices):
        tokens, target = mixed.example(int(index))
        wanted += [(row, t - 1, int(tokens[t])) for t in range(1, len(tokens)) if target[t]]
    width = ids.shape[1]
    found = [
        (int(p) // width, int(p) % width, int(label))
        for p, label, use in zip(positions, np.array(batch.labels), used, strict=True)
        if use
    ]
    assert found == wanted


def test_configuration_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('mask = "static"\nkeep_units = 64\n[[stages]]\ntokens = 10\n')
    config = load_config(path)
    assert (config.mask, config.keep_units, config.stages[0].tokens) == ("static", (64,), 10)
    assert config_from_dict(TrainingConfig, json.loads(json.dumps(_asdict(config)))) == config


def _asdict(config: TrainingConfig) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"maks": "ifp"}, "unknown key maks"),
        ({"optimizer": {"lr": 1}}, "unknown key optimizer.lr"),
        ({"mask": "soft"}, "mask must be one of none, static, ifp"),
        ({"seed": "x"}, "seed must be int"),
        ({"seed": True}, "seed must be int"),
        ({"data": 3}, "data. must be a table"),
        ({"keep_units": [0]}, "keep_units"),
        ({"stages": [{"tokens": 0}]}, "positive number of tokens"),
        ({"stages": [{"tokens": 1, "document_share": 2.0}]}, "between 0 and 1"),
        ({"batch_tokens": 8}, "batch_tokens"),
        ({"joint": {"start_share": 3.0}}, "start_share"),
        ({"optimizer": {"learning_rate": 0}}, "positive"),
    ],
)
def test_bad_configuration_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_from_dict(TrainingConfig, values)


def test_unreadable_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("mask = [")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "run.toml")


def test_committed_configurations_are_valid() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "training"
    configs = {path.stem: load_config(path) for path in folder.glob("*.toml")}
    assert {"ifp_joint", "ifp_fixed", "static", "dense"} <= set(configs)
    # The rows of the table differ in their masks and in nothing else.
    rows = [configs[name] for name in ("ifp_joint", "ifp_fixed", "static", "dense")]
    for subject in (
        "keep_units",
        "stages",
        "batch_tokens",
        "seed",
        "data",
        "optimizer",
        "distillation",
    ):
        assert len({repr(getattr(config, subject)) for config in rows}) == 1

"""Measuring a task's candidates on a tiny model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.chat_template import chat_ids
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.convert.quantize import make_quantization, quantize_model
from ifp_mlx.errors import DataError
from ifp_mlx.fitting.answers import write_answer
from ifp_mlx.fitting.candidates import Candidate
from ifp_mlx.fitting.fidelity import (
    TOP_TOKENS,
    Comparison,
    Fidelity,
    Reference,
    answer_logits,
)
from ifp_mlx.fitting.judge import CommandJudge
from ifp_mlx.fitting.measure import Fit, Halves, with_fewer_bits
from ifp_mlx.fitting.results import FitRecord, Measured
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import CutOptions, slice_model
from ifp_mlx.storage.weights import load_model
from ifp_mlx.text.task_examples import TaskExample, read_task_examples
from ifp_mlx.units.modules import clone_module, stored_bytes

CheckpointFactory = Callable[..., Path]
ModelFactory = Callable[..., nn.Module]
EXAMPLES = [TaskExample(f"say {word}", word) for word in ("one", "two", "three", "four", "five")]
PROMPT, ANSWER = [3, 14, 15, 9, 26], [5, 35, 8, 9, 7, 9]


def fit(path: Path, folder: Path, judge: CommandJudge | None = None) -> list[Measured]:
    assistant = Assistant.load(path, options=CutOptions(context_tokens=64))
    record = FitRecord(folder, {"path": str(path)})
    run = Fit(assistant, "say words", Halves.of(EXAMPLES, 2), record, judge=judge, max_tokens=6)
    return list(run.run())


def test_logits_of_an_answer_are_those_of_one_pass(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    whole = model(mx.array([PROMPT + ANSWER]))[0, len(PROMPT) - 1 : -1]
    np.testing.assert_allclose(answer_logits(model, PROMPT, ANSWER), whole, atol=1e-5)


def test_a_model_is_faithful_to_itself(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    found = Comparison.of(model, Reference.of(model, PROMPT, ANSWER))
    assert found.changed == pytest.approx([0] * 6, abs=1e-6)
    assert found.same_tokens == 6


def test_changed_is_the_total_variation_between_next_tokens(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    part = slice_model(model, select_random(model, 64))
    found = Comparison.of(part, Reference.of(model, PROMPT, ANSWER))
    ours = np.array(mx.softmax(answer_logits(part, PROMPT, ANSWER), axis=-1), np.float64)
    whole = np.array(mx.softmax(answer_logits(model, PROMPT, ANSWER), axis=-1), np.float64)
    variation = np.abs(ours - whole).sum(axis=-1) / 2
    assert len(whole[0]) > TOP_TOKENS  # the rest counts as one token, which can only hide something
    assert np.all(np.array(found.changed) <= variation + 1e-6)
    assert np.array(found.changed) == pytest.approx(variation, rel=0.5)
    same = ours.argmax(-1) == whole.argmax(-1)
    assert found.same_tokens == (np.flatnonzero(~same)[0] if not same.all() else 6)


def test_figures_are_of_all_tokens_and_of_the_median_answer() -> None:
    answers = [Comparison((0.1, 0.3), 0), Comparison((0.2,), 1), Comparison((0.0, 0.0, 0.0), 3)]
    assert Fidelity.of(answers).changed == pytest.approx(10.0)
    assert Fidelity.of(answers).same_tokens == 1


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_every_candidate_is_measured_once(
    tiny_checkpoint: CheckpointFactory,
    tmp_path: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ifp_mlx.fitting.measure.LOST_CHANGED", 100.0)  # a random model loses much
    sizes = {"intermediate_size": 640} if family == "llama" else {"num_experts": 16}
    path = tiny_checkpoint(family, hidden_size=64, **sizes)
    rows = {row.candidate: row for row in fit(path, tmp_path / "fits")}
    amount = 640 if family == "llama" else 16
    whole = rows[Candidate(amount)]
    assert whole.fidelity.changed == pytest.approx(0, abs=1e-4)
    assert whole.tokens_per_s
    assert rows[Candidate(amount, 4)].disk_bytes < rows[Candidate(amount, 8)].disk_bytes
    assert rows[Candidate(amount, 8)].disk_bytes < whole.disk_bytes
    part = rows[Candidate(320 if family == "llama" else 8)]
    assert part.disk_bytes < whole.disk_bytes
    assert part.memory_bytes < whole.memory_bytes
    assert (Candidate(448, only_reads=True) in rows) == (family == "llama")
    (stored,) = (tmp_path / "fits").iterdir()
    before = stored.read_bytes()
    again = {row.candidate: row for row in fit(path, tmp_path / "fits")}
    assert again == rows
    assert stored.read_bytes() == before


def test_widths_are_those_of_the_files_wherever_layers_are_unpacked(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = tiny_checkpoint(hidden_size=64, intermediate_size=640)
    model, config = load_model(path)
    settings, _ = quantize_model(model, config, make_quantization(bits=4))
    (path / "config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    assistant = Assistant.load(path, options=CutOptions(context_tokens=64))
    run = Fit(assistant, "say words", Halves.of(EXAMPLES, 2), FitRecord(tmp_path, {}))
    assert {candidate.bits for candidate in run.candidates()} == {None, 3}


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_fewer_bits_unpacked_are_the_packed_model(tiny_model: ModelFactory, bits: int) -> None:
    model = tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=192)
    packed = clone_module(model)
    quantize_model(packed, {}, make_quantization(bits=bits))
    unpacked, num_bytes = with_fewer_bits(model, bits)
    ids = mx.array([PROMPT + ANSWER])
    np.testing.assert_allclose(unpacked(ids), packed(ids), atol=1e-4)
    assert num_bytes == stored_bytes(packed)
    assert num_bytes < stored_bytes(model)


def test_the_check_sees_every_answer(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"import sys; open({str(log)!r}, chr(97)).write(sys.stdin.read() + chr(10))"
    rows = fit(tiny_checkpoint(), tmp_path / "fits", CommandJudge(f'{sys.executable} -c "{code}"'))
    whole = next(row for row in rows if row.candidate == Candidate(192))
    assert (whole.num_right, whole.num_checked) == (2, 2)
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(request["prompt"], request["expected"]) for request in seen} == {
        ("say two", "two"),
        ("say four", "four"),
    }


def test_an_answer_that_has_ended_does_not_go_on(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tiny_checkpoint(), tmp_path / "log"
    assistant = Assistant.load(path, options=CutOptions(context_tokens=64))
    prompt_ids = chat_ids(assistant.tokenizer, [{"role": "user", "content": "say two"}])
    answer_ids, _ = write_answer(assistant.dense().model, assistant, prompt_ids, 6)
    last = next(i for i in range(1, 6) if answer_ids[i] not in answer_ids[:i])
    monkeypatch.setattr(
        "mlx_lm.tokenizer_utils.TokenizerWrapper.eos_token_ids", {answer_ids[last]}, raising=False
    )
    code = f"import sys; open({str(log)!r}, chr(97)).write(sys.stdin.read() + chr(10))"
    fit(path, tmp_path / "fits", CommandJudge(f'{sys.executable} -c "{code}"'))
    first = json.loads(log.read_text().splitlines()[0])
    assert first["prompt"] == "say two"
    assert first["answer"] == assistant.tokenizer.decode(answer_ids[: last + 1])


def test_answers_that_go_on_from_the_whole_models_are_the_candidates_own(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifp_mlx.fitting.measure.LOST_CHANGED", 100.0)
    path, log = tiny_checkpoint(intermediate_size=640), tmp_path / "log"
    code = f"import sys; open({str(log)!r}, chr(97)).write(sys.stdin.read() + chr(10))"
    rows = fit(path, tmp_path / "fits", CommandJudge(f'{sys.executable} -c "{code}"'))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    answers = {row.candidate: lines[2 * index : 2 * index + 2] for index, row in enumerate(rows)}
    assistant = Assistant.load(path, options=CutOptions(context_tokens=64))
    for candidate, found in answers.items():
        if candidate.bits is not None or candidate.only_reads:
            continue
        kept = candidate.num_kept_units
        subnet = assistant.subnetwork_for_task("say words", kept, EXAMPLES[0::2])
        for request in found:
            messages = [{"role": "user", "content": request["prompt"]}]
            conversation = assistant.converse(subnet)
            whole = "".join(conversation.reply(messages, SamplingOptions(max_new_tokens=6)))
            assert request["answer"]
            assert whole.startswith(request["answer"])  # at most the last token is cut off


def test_halves_share_no_prompt() -> None:
    doubled = [*EXAMPLES, TaskExample("say one", "uno")]
    halves = Halves.of(doubled, 20)
    assert not {e.prompt for e in halves.selecting} & {e.prompt for e in halves.measuring}
    assert len(halves.selecting) + len(halves.measuring) == 5
    with pytest.raises(DataError, match="at least two"):
        Halves.of([EXAMPLES[0], EXAMPLES[0]], 20)


def test_a_model_that_does_not_fit_needs_answers(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = tiny_checkpoint()
    assistant = Assistant.load(
        path, options=CutOptions(context_tokens=64, memory_bytes=1, force=True)
    )
    record = FitRecord(tmp_path, {})
    halves = Halves.of([TaskExample("a"), TaskExample("b")], 1)
    with pytest.raises(DataError, match='give each an "answer"'):
        Fit(assistant, "say words", halves, record)
    run = Fit(assistant, "say words", Halves.of(EXAMPLES, 2), record, max_tokens=6)
    rows = {row.candidate: row for row in run.run()}
    assert rows[Candidate(192)].fidelity.changed == 0
    assert all(candidate.bits is None for candidate in rows if candidate.num_kept_units == 192)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("lines.txt", "say one\n\n say two \n", [("say one", None), ("say two", None)]),
        ("rows.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "response": "d"}',
         [("a", "b"), ("c", "d")]),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "a"}, '
         '{"role": "assistant", "content": "b"}]}', [("a", "b")]),
        ("twice.txt", "a\na", [("a", None)]),
    ],
)  # fmt: skip
def test_examples_as_people_have_them(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, str | None]]
) -> None:
    (tmp_path / name).write_text(content)
    found = read_task_examples(tmp_path / name)
    assert [(example.prompt, example.answer) for example in found] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no example"), ("nothing", "no JSON object"), ('{"text": 1}', 'no "prompt"')],
)
def test_examples_that_are_none_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_task_examples(path)

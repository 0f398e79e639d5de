"""Quality tables: rows, masks, controls, and that masks measure what slicing gives."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import DataError, UsageError
from ifp_mlx.evaluation.controls import UnitMasks, unit_masks
from ifp_mlx.evaluation.quality import HeldOutExample, evaluate, load_held_out
from ifp_mlx.evaluation.rows import Row, parse_row
from ifp_mlx.evaluation.subject import Subject
from ifp_mlx.evaluation.table import markdown_table, measure_rows, shortened
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.selection.selectors import NamedSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.selection.top_k import top_k_indices
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.subnets.selectors import SelectorFiles, make_selector
from ifp_mlx.units.amounts import Amounts
from ifp_mlx.units.families import FAMILIES
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.modules import unit_shape

F = 192
AMOUNTS = Amounts(192, 64, 64, "FFN units")
LAYERS = 3
EXACT = 2e-5  # nats; float32 sums in another order

Model = Callable[..., nn.Module]


def make_examples(num: int = 6, vocab_size: int = 67) -> list[HeldOutExample]:
    rng = np.random.default_rng(3)
    return [
        HeldOutExample(
            tuple(int(i) for i in rng.integers(0, vocab_size, size=14 + index)),
            7 + index % 3,
            ("alpha", "lm_beta", "gamma")[index % 3],
        )
        for index in range(num)
    ]


@pytest.fixture
def subject(tiny_model: Model) -> Subject:
    model = tiny_model()
    rng = np.random.default_rng(5)
    texts = [
        CalibrationExample([int(i) for i in rng.integers(0, 67, size=30)], task)
        for task in ("alpha", "beta")
    ]
    files = SelectorFiles(calibration=calibrate(model, texts))
    return Subject(model, tokenizer=None, files=files)  # type: ignore[arg-type]


def selector_of(subject: Subject, name: str) -> NamedSelector:
    return make_selector(SelectorSpec(name), subject.model, subject.files)


def by_domain(examples: list[HeldOutExample]) -> dict[str, list[HeldOutExample]]:
    domains: dict[str, list[HeldOutExample]] = {}
    for example in examples:
        domains.setdefault(example.domain, []).append(example)
    return domains


def cross_entropy(model: nn.Module, example: HeldOutExample) -> float:
    """The oracle: one example at a time through the model's own call, softmax in NumPy."""
    logits = np.array(model(mx.array([example.token_ids])))[0].astype(np.float64)  # (T, V)
    losses = []
    for position in range(example.num_prompt_tokens, len(example.token_ids)):
        row = logits[position - 1]
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max())
        losses[-1] -= row[example.token_ids[position]]
    return float(np.mean(losses))


def test_masked_rows_equal_sliced_models(subject: Subject) -> None:
    examples = make_examples()
    row = Row("blend", 100)
    masks = subject.masks([row], examples)[row]
    assert masks is not None
    blend = selector_of(subject, "blend")
    for example in examples:
        compact = slice_model(subject.model, select(blend, example.prompt_ids, 100))
        batched = evaluate(subject.masked_model(row), examples, masks)  # all in one padded batch
        alone = evaluate(subject.masked_model(row), [example], masks)
        assert alone[example.domain].cross_entropy == pytest.approx(
            cross_entropy(compact, example), abs=EXACT
        )
        same_domain = [e for e in examples if e.domain == example.domain]
        singly = [evaluate(subject.masked_model(row), [e], masks) for e in same_domain]
        total = sum(q[example.domain].cross_entropy * q[example.domain].num_tokens for q in singly)
        tokens = sum(q[example.domain].num_tokens for q in singly)
        assert batched[example.domain].cross_entropy == pytest.approx(total / tokens, abs=EXACT)


def test_compact_model_is_what_the_row_measures(subject: Subject) -> None:
    examples = make_examples(3)
    row = Row("prompt", 65)
    masks = subject.masks([row], examples)[row]
    assert masks is not None
    measured = evaluate(subject.masked_model(row), examples[:1], masks)[examples[0].domain]
    compact = subject.compact_model(row, masks, examples[0])
    assert compact.args.intermediate_size == 65
    assert measured.cross_entropy == pytest.approx(cross_entropy(compact, examples[0]), abs=EXACT)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])  # the latter has groups
def test_rows_of_a_mixture_measure_its_slices(tiny_model: Model, family: str) -> None:
    model = tiny_model(family)
    subject = Subject(model, tokenizer=None)  # type: ignore[arg-type]
    examples = make_examples()
    rows = [Row("prompt", 4), Row("random", 4), Row("prompt", 4, control="fixed")]
    results = measure_rows(subject, rows, by_domain(examples), with_reference=True)
    masks = subject.masks(rows, examples)
    for row, result in zip(rows, results, strict=True):
        chosen = masks[row]
        assert chosen is not None
        losses: dict[str, list[float]] = {}
        for example in examples:
            compact = subject.compact_model(row, chosen, example)
            assert unit_shape(compact).num_units == 4
            scored = len(example.token_ids) - example.num_prompt_tokens
            losses.setdefault(example.domain, []).extend([cross_entropy(compact, example)] * scored)
        for domain, expected in losses.items():
            quality = result.qualities[domain]
            assert quality.num_tokens == len(expected)
            assert quality.num_examples == 2
            assert quality.cross_entropy == pytest.approx(np.mean(expected), abs=EXACT)
            assert quality.kl is not None
            assert quality.kl > 0.001
    prompt, random, _ = results
    assert prompt.qualities != random.qualities


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_losses_are_of_the_models_own_logits(tiny_model: Model, family: str) -> None:
    """Some families scale or cap their logits, and not all say where their head is."""
    model = tiny_model(family)
    for example in make_examples(2):
        found = evaluate(model, [example], lambda batch: None)[example.domain].cross_entropy
        assert found == pytest.approx(cross_entropy(model, example), abs=EXACT)


def test_dense_row_is_the_models_own_call(subject: Subject) -> None:
    examples = make_examples(3)
    (result,) = measure_rows(subject, [Row("dense", F)], by_domain(examples), with_reference=True)
    for example in examples:
        quality = result.qualities[example.domain]
        assert quality.cross_entropy == pytest.approx(
            cross_entropy(subject.model, example), abs=EXACT
        )
        assert quality.perplexity == pytest.approx(np.exp(quality.cross_entropy))
        assert quality.kl == pytest.approx(0.0, abs=EXACT)
        assert quality.top1 == 1.0


def test_kl_and_agreement_against_numpy(subject: Subject) -> None:
    example = make_examples(1)[0]
    row = Row("random", 64)
    (result,) = measure_rows(subject, [row], {"alpha": [example]}, with_reference=True)
    compact = subject.compact_model(row, subject.masks([row], [example])[row], example)

    def log_probabilities(model: nn.Module) -> np.ndarray:
        logits = np.array(model(mx.array([example.token_ids])))[0].astype(np.float64)
        logits = logits[example.num_prompt_tokens - 1 : -1]
        normalised: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return normalised

    dense, cut = log_probabilities(subject.model), log_probabilities(compact)
    kl = (np.exp(dense) * (dense - cut)).sum(axis=-1).mean()
    agreement = (dense.argmax(-1) == cut.argmax(-1)).mean()
    assert result.qualities["alpha"].kl == pytest.approx(kl, abs=EXACT)
    assert result.qualities["alpha"].top1 == pytest.approx(agreement)
    assert kl > 1e-3  # or the comparison would say nothing


def test_each_input_gets_its_own_masks(subject: Subject) -> None:
    examples = make_examples()
    row = Row("prompt", 50)
    masks = subject.masks([row], examples)[row]
    assert masks is not None
    for example in examples:
        wanted = select(selector_of(subject, "prompt"), example.prompt_ids, 50)
        assert np.array_equal(masks.of(example), np.array(wanted.pick.mask()).astype(bool))
        assert mx.array_equal(masks.indices_of(example), wanted.pick.indices)
    assert not np.array_equal(masks.of(examples[0]), masks.of(examples[1]))
    assert masks(examples[:2]).shape == (2, LAYERS, F)


def test_per_task_masks_come_from_the_description(subject: Subject) -> None:
    class Words:
        chat_template = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(letter) % 67 for letter in text]

    described = Subject(
        subject.model,
        Words(),  # type: ignore[arg-type]
        subject.files,
        task_descriptions={"alpha": "count", "lm_beta": "rhyme", "gamma": "draw"},
    )
    examples = make_examples()
    row = Row("prompt", 40, per_task=True)
    masks = described.masks([row], examples)[row]
    assert masks is not None
    wanted = select(selector_of(subject, "prompt"), [ord(c) % 67 for c in "count"], 40)
    assert np.array_equal(masks.of(examples[0]), np.array(wanted.pick.mask()).astype(bool))
    assert np.array_equal(masks.of(examples[0]), masks.of(examples[3]))  # of one domain
    assert not np.array_equal(masks.of(examples[0]), masks.of(examples[1]))
    with pytest.raises(UsageError, match="needs a task description of delta"):
        described.check(row, ["alpha", "delta"])


def test_domain_prior_is_that_of_the_texts_domain(subject: Subject) -> None:
    examples = make_examples(3)
    row = Row("domain", 30)
    masks = subject.masks([row], examples)[row]
    assert masks is not None
    assert subject.files.calibration is not None
    importances = {
        "alpha": subject.files.calibration.tasks["alpha"],
        "lm_beta": subject.files.calibration.tasks["beta"],
        "gamma": subject.files.calibration.importance,  # not calibrated: all text
    }
    for example in examples:
        wanted = np.array(top_k_indices(importances[example.domain], 30))
        assert np.array_equal(np.nonzero(masks.of(example))[1].reshape(LAYERS, -1), wanted)


def test_fixed_control_keeps_the_most_frequent_units() -> None:
    kept = np.zeros((3, 1, 5), dtype=bool)
    kept[0, 0, [0, 3]] = True
    kept[1, 0, [3, 4]] = True
    kept[2, 0, [1, 4]] = True
    fixed = UnitMasks(make_examples(3), kept).fixed()
    assert np.array_equal(np.nonzero(fixed.kept[0, 0])[0], [3, 4])
    assert all(np.array_equal(mask, fixed.kept[0]) for mask in fixed.kept)


def test_shuffled_control_takes_masks_of_other_domains() -> None:
    examples = make_examples(9)
    kept = np.zeros((9, 1, 9), dtype=bool)
    kept[np.arange(9), 0, np.arange(9)] = True  # a mask tells whose it is
    masks = UnitMasks(examples, kept)
    shuffled = masks.shuffled()
    for example in examples:
        giver = examples[int(np.argmax(shuffled.of(example)[0]))]
        assert giver.domain != example.domain
    assert np.array_equal(shuffled.kept, masks.shuffled().kept)


def test_shuffled_control_needs_two_domains() -> None:
    examples = [e for e in make_examples() if e.domain == "alpha"]
    masks = UnitMasks(examples, np.ones((len(examples), 1, 4), dtype=bool))
    with pytest.raises(UsageError, match="at least two domains"):
        masks.shuffled()


def test_random_masks_keep_exactly_k_and_follow_the_seed(subject: Subject) -> None:
    examples = make_examples(2)
    rows = [Row("random", 50), Row("random", 50, argument="1"), Row("random", 77)]
    masks = subject.masks(rows, examples)
    kept = [masks[row].of(examples[0]) for row in rows]  # type: ignore[union-attr]
    assert [set(mask.sum(axis=-1)) for mask in kept] == [{50}, {50}, {77}]
    assert not np.array_equal(kept[0], kept[1])
    assert (kept[0] <= kept[2]).all()  # one order, cut at another K


def test_instructions_are_scored_once(subject: Subject) -> None:
    class Counting:
        calls = 0

        def scores(self, texts: object) -> mx.array:
            self.calls += 1
            return mx.arange(float(F)).reshape(1, 1, F)

    counting = Counting()
    named = NamedSelector(counting, SelectorSpec("counting"), "ffn", UnitShape((0,), F))
    examples = make_examples()
    masks = unit_masks(examples, lambda example: (named, ()), [3, 5, 3])
    assert counting.calls == 1
    assert set(masks) == {3, 5}


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("dense", Row("dense", F)),
        ("blend", Row("blend", 128)),
        ("static@0.4", Row("static", 64)),  # 76.8 units, rounded to the nearest 64
        ("static:math+adapted@64", Row("static", 64, "math", adapted=True)),
        ("blend:0.85@1", Row("blend", F, "0.85")),
        ("predictor+task@64", Row("predictor", 64, per_task=True, adapted=True)),
        ("prompt+shuffled+adapted@64", Row("prompt", 64, control="shuffled", adapted=True)),
    ],
)
def test_parse_row_reads_what_a_label_writes(text: str, row: Row) -> None:
    parsed = parse_row(text, AMOUNTS, 128)
    assert parsed == row
    if row.selector != "dense":
        assert parse_row(parsed.label, AMOUNTS, 1) == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no row"),
        ("blend 0.5", "is no row"),
        ("bland@0.5", "no selector 'bland'; there are dense"),
        ("blend+often@0.5", "no change 'often'; there are task"),
        ("blend+fixed+shuffled", "exclude each other"),
        ("dense@0.5", "dense keeps every unit"),
        ("dense+fixed", "dense keeps every unit"),
        ("static+task", "does not read its input"),
        ("predictor:3", "takes no argument"),
        ("random:x", "seed must be a whole number"),
        ("blend:2", "share must be from 0 to 1"),
        ("blend:lots", "share must be from 0 to 1"),
        ("blend@1.2.3", "is no amount"),
        ("blend@70.5", "is no amount"),
        ("blend@70", "multiple of 64"),
        ("blend@9999", "between 64 and 192"),
        ("blend@0", "above 0"),
    ],
)
def test_parse_row_refuses(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_row(text, AMOUNTS, 128)


def test_rows_are_refused_before_anything_is_measured(tiny_model: Model) -> None:
    bare = Subject(tiny_model(), tokenizer=None)  # type: ignore[arg-type]
    examples = by_domain(make_examples(3))
    for text, message in {
        "static@64": "needs a calibration",
        "blend@64": "needs a calibration",
        "predictor@64": "needs an adapter with a predictor",
        "dense+adapted": "needs an adapter",
    }.items():
        with pytest.raises(UsageError, match=message):
            measure_rows(bare, [Row("dense", F), parse_row(text, AMOUNTS, F)], examples)


def test_table_has_a_line_a_row_and_the_means(subject: Subject) -> None:
    examples = by_domain(make_examples())
    results = measure_rows(subject, [Row("dense", F), Row("random", 64)], examples)
    lines = markdown_table(results).splitlines()
    assert lines[0] == "| row | K | all tokens | instructions | alpha | gamma | documents | beta |"
    assert lines[1].count("|") == lines[0].count("|")
    mean = np.mean([results[1].qualities[d].cross_entropy for d in ("alpha", "gamma")])
    qualities = results[1].qualities.values()
    pooled = np.average(
        [q.cross_entropy for q in qualities], weights=[q.num_tokens for q in qualities]
    )
    assert lines[3].startswith(f"| random | 64 | {pooled:.3f} | **{mean:.3f}** |")
    record = results[1].to_dict()
    assert record["row"] == "random@64"
    assert record["mean_cross_entropy"]["instructions"] == pytest.approx(mean)
    json.dumps(record)


def test_shortened_examples_keep_their_prompts() -> None:
    examples = by_domain(make_examples())
    for domain, cut in shortened(examples, 2).items():
        for before, after in zip(examples[domain], cut, strict=True):
            assert after.prompt_ids == before.prompt_ids
            assert len(after.token_ids) == before.num_prompt_tokens + 2


def test_held_out_text_is_read_by_domain(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    folder = tmp_path / "eval"
    folder.mkdir()
    record = {"prompt": "2+2?", "response": "4"}
    (folder / "math.jsonl").write_text(json.dumps(record) + "\nnot json\n")
    (folder / "lm_books.jsonl").write_text(json.dumps({"text": "word " * 100}) + "\n")
    examples = load_held_out(folder, tokenizer, 5)
    assert set(examples) == {"math", "lm_books"}
    (math,) = examples["math"]
    assert tokenizer.decode(list(math.token_ids[math.num_prompt_tokens :])) == "4"
    assert examples["lm_books"][0].num_prompt_tokens == 256
    assert list(load_held_out(folder, tokenizer, 5, ["math"])) == ["math"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no .jsonl file"), ("", "no usable record"), ('{"prompt": "a"}\n', "no usable record")],
    ids=["none", "empty", "fields"],
)
def test_bad_held_out_text_is_one_error(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], content: str | None, message: str
) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    if content is not None:
        (tmp_path / "math.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_held_out(tmp_path, tokenizer, 5)


def test_calibration_is_not_needed_for_random_rows(tiny_model: Model) -> None:
    bare = Subject(tiny_model(), tokenizer=None)  # type: ignore[arg-type]
    results = measure_rows(bare, [Row("random", 64)], by_domain(make_examples(3)))
    assert results[0].qualities.keys() == {"alpha", "lm_beta", "gamma"}
    assert results[0].mean("kl") is None

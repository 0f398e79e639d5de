"""Batched and mixed reading is exact: the same tokens as one prompt at a time, whoever reads."""

from collections.abc import Callable

import decoding
import fidelity
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from decoding import Reader, Reading
from mlx_lm.generate import generate_step
from parts import packed_bytes, with_rounded_weights
from prompts import Prompt

from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units.modules import named_arrays

Ids = tuple[int, ...]
TinyModel = Callable[..., nn.Module]

VOCABULARY = 67
STOPS = {0, 1, 2}
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 256}  # in groups of 64


def some_prompts() -> list[Ids]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(3, VOCABULARY, n).tolist()) for n in rng.integers(2, 40, 5)]


def read(model: nn.Module, ids: Ids) -> decoding.Cache:
    return decoding.read([(model, ids)], len(model.layers))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_writes_what_mlx_lm_writes_one_by_one(tiny_model: TinyModel, family: str) -> None:
    model, prompts = tiny_model(family), some_prompts()
    caches = [read(model, ids[:-1]) for ids in prompts]
    last_ids = [ids[-1] for ids in prompts]
    written = decoding.write(model, caches, last_ids, 40, STOPS)
    for ids, answer in zip(prompts, written, strict=True):
        alone: list[int] = []
        for token, _ in generate_step(mx.array(list(ids)), model, max_tokens=40):
            alone.append(int(token))
            if alone[-1] in STOPS:
                break
        assert answer == alone
    assert decoding.write(model, caches, last_ids, 40, STOPS) == written  # caches are left alone


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_part_reads_and_the_whole_writes_as_one_by_one(
    tiny_model: TinyModel, family: str
) -> None:
    model = tiny_model(family)
    part = slice_model(model, select_random(model, 64))
    caches = [decoding.read([(part, ids[:-1]), (model, ids[-1:])], 3) for ids in some_prompts()]
    together = decoding.write(model, caches, [5] * len(caches), 30, STOPS)
    alone = [decoding.write(model, [cache], [5], 30, STOPS)[0] for cache in caches]
    assert together == alone
    whole = [read(model, ids) for ids in some_prompts()]
    assert decoding.write(model, whole, [5] * len(whole), 30, STOPS) != together


def test_states_of_a_written_answer_lead_to_that_answer(tiny_model: TinyModel) -> None:
    model, ids = tiny_model("qwen2"), some_prompts()[0]
    [answer] = decoding.write(model, [read(model, ids[:-1])], [ids[-1]], 20, STOPS)
    hidden = decoding.answer_hidden(model, read(model, ids[:-1]), ids[-1], answer)
    assert mx.argmax(decoding.logits_of(model, hidden), axis=-1).tolist() == answer


def test_a_plan_gives_every_token_but_the_last_to_one_reader() -> None:
    prompts = [Prompt(tuple(range(10)), 4), Prompt(tuple(range(20, 26)), 0)]
    for reading in (Reading(), Reading(tail=3), Reading(tail="message"), Reading(block=7, tail=2)):
        segments, last = decoding.plan_reading(prompts, [[10, 11, 12]], reading)
        read_ids = [token for segment in segments for token in segment.ids]
        assert read_ids == [*range(13), *range(20, 25)]
        assert last == 25


def test_a_plan_says_who_reads_what() -> None:
    prompt = Prompt(tuple(range(10)), 6)

    def readers(reading: Reading) -> list[tuple[Reader, int]]:
        segments, _ = decoding.plan_reading([prompt], [], reading)
        return [(segment.reader, len(segment.ids)) for segment in segments]

    assert readers(Reading()) == [(Reader.READ, 9)]
    assert readers(Reading(tail=3)) == [(Reader.READ, 7), (Reader.WRITE, 2)]
    assert readers(Reading(tail="message")) == [(Reader.READ, 6), (Reader.WRITE, 3)]
    assert readers(Reading(tail=64)) == [(Reader.WRITE, 9)]
    assert readers(Reading(tail=2, block=4)) == [
        (Reader.WHOLE, 4),
        (Reader.READ, 4),
        (Reader.WRITE, 1),
    ]


def test_batches_hold_every_index_once_and_keep_to_the_limits() -> None:
    lengths = np.random.default_rng(1).integers(1, 500, 100).tolist()
    groups = decoding.batches(lengths, 16, 2000)
    assert sorted(index for group in groups for index in group) == list(range(100))
    for group in groups:
        assert len(group) <= 16
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 2000


def test_a_model_compared_with_itself_differs_in_nothing(tiny_model: TinyModel) -> None:
    model, ids = tiny_model(), some_prompts()[1]
    hidden = decoding.answer_hidden(model, read(model, ids[:-1]), ids[-1], [5, 6, 7])
    found = fidelity.figures(fidelity.compare(model, [hidden], model, [hidden], [[5, 6, 7]]))
    assert found["agreement"] == found["answers_without_flip"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["acceptance"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rounded_weights_compute_what_packed_ones_do(tiny_model: TinyModel, bits: int) -> None:
    model = tiny_model(**WIDE)
    rounded = with_rounded_weights(model, bits)
    ids = mx.array([list(some_prompts()[1])])
    before = model(ids)
    packed = tiny_model(**WIDE)
    nn.quantize(packed, 64, bits)
    assert mx.allclose(rounded(ids), packed(ids), rtol=1e-3, atol=1e-3).item()
    assert mx.array_equal(model(ids), before).item()  # the source is unchanged
    stored = sum(
        array.nbytes if array.dtype == mx.uint32 else array.size * 2
        for array in named_arrays(packed).values()
    )
    assert packed_bytes(rounded, bits) == stored

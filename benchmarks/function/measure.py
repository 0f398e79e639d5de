"""One model with its tokenizer, parts and sets: measures who reads and who writes."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import decoding
import fidelity
import mlx.core as mx
import mlx.nn as nn
from decoding import Reader
from parts import PartMaker, packed_bytes
from prompts import Item, Prompt, answer_ids, answer_text, prompts_of
from results import Answers, Pending, Results
from rows import WHOLE, Row, Unit
from sets import Data, FunctionSet, build_set

from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model


class Bench:
    """One model with its tokenizer, parts and sets.

    Args:
        arguments: of the command line.
        model_name: a folder of the models folder.
        results: where answers and figures go.
    """

    def __init__(self, arguments: argparse.Namespace, model_name: str, results: Results):
        path = arguments.models / model_name
        dtype = getattr(mx, arguments.dtype)
        self._whole, _ = load_model(path, dtype)
        self._tokenizer = load_tokenizer(path)
        self._data = Data(arguments.data)
        file = results.folder / f"calibration-{model_name}-{arguments.calibrate}.safetensors"
        self._parts = PartMaker(self._whole, self._tokenizer, self._data, file, arguments.calibrate)
        self._limit = arguments.limit
        self._max_batch = arguments.batch
        bytes_per_token = decoding.cache_bytes_per_token(self._whole)
        self._max_tokens = int(arguments.cache_gb * 1e9 / bytes_per_token)
        self._results = results
        self._sets: dict[str, tuple[FunctionSet, list[list[Prompt]]]] = {}
        self._whole_hidden: dict[tuple[str, str, int], list[mx.array]] = {}

    def measure(self, unit: Unit, pool: concurrent.futures.Executor) -> Pending:
        """Measure a unit; its answers are judged in the pool."""
        mx.reset_peak_memory()
        seconds: dict[str, float] = {}
        with _timed(seconds, "prompts"):
            function_set, prompts = self._set(unit.set_name)
        limit = min(filter(None, (unit.limit, self._limit, len(prompts))))
        items, prompts = function_set.items[:limit], prompts[:limit]
        with _timed(seconds, "part"):
            models = Models(self._parts, unit.row, function_set.task, 2 * self._max_tokens)
        line: dict[str, Any] = {
            "model": unit.model,
            "row": dataclasses.asdict(unit.row),
            "set": unit.set_name,
            "kept_units": models.num_kept_units,
            "units": self._parts.num_units,
            "part_bytes": packed_bytes(
                self._whole if models.part is None else models.part, unit.row.part.bits
            ),
            "prompt_tokens": sum(len(p.ids) for item in prompts for p in item),
        }
        outcomes: dict[str, concurrent.futures.Future[float]] = {}
        if function_set.max_new_tokens:
            with _timed(seconds, "answers"):
                answers = self._answer(models, prompts, function_set.max_new_tokens)
            self._results.save_answers(unit, answers)
            outcomes = self._judge(items, answers, pool)
            line["answer_tokens"] = sum(len(turn) for item in answers for turn in item)
            whole = self._results.load_answers(dataclasses.replace(unit, row=Row(WHOLE)))
            pairs = zip(answers, whole, strict=True)
            flat = [turns for item in pairs for turns in zip(*item, strict=True)]
            line["free_running"] = fidelity.free_running(*zip(*flat, strict=True))
            if unit.own and len(prompts[0]) == 1 and unit.row.name != WHOLE:
                own = [item[0] for item in whole[: unit.own]]
                with _timed(seconds, "own"):
                    tokens = self._compare(unit, models, prompts, own, "own")
                    line["own"] = fidelity.figures(tokens)
        if unit.reference and len(prompts[0]) == 1:
            with _timed(seconds, "reference"):
                line["reference"] = self._on_references(
                    unit, models, items, prompts, pool, outcomes
                )
        line["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
        return Pending(unit, line, outcomes)

    def _on_references(
        self,
        unit: Unit,
        models: "Models",
        items: Sequence[Item],
        prompts: Sequence[list[Prompt]],
        pool: concurrent.futures.Executor,
        outcomes: "dict[str, concurrent.futures.Future[float]]",
    ) -> dict[str, float]:
        """Return figures on reference answers; of sets that write nothing, also the outcomes."""
        chosen = [index for index, item in enumerate(items) if item.turns[0].reference]
        chosen = chosen[: unit.reference]
        references = [
            list(answer_ids(items[i].turns[0].reference, items[i], self._tokenizer)) for i in chosen
        ]
        tokens = self._compare(unit, models, [prompts[i] for i in chosen], references, "reference")
        if not outcomes:
            decoded = [[self._tokenizer.decode([t]) for t in answer] for answer in references]
            shares = fidelity.right_lines(tokens, references, decoded)
            for index, share in zip(chosen, shares, strict=True):
                outcomes[items[index].name] = pool.submit(float, share)
        return fidelity.figures(tokens)

    def _set(self, name: str) -> tuple[FunctionSet, list[list[Prompt]]]:
        if name not in self._sets:
            function_set = build_set(name, self._data, self._tokenizer)
            prompts = [prompts_of(item, self._tokenizer) for item in function_set.items]
            self._sets[name] = function_set, prompts
        return self._sets[name]

    def _answer(
        self, models: "Models", prompts: Sequence[list[Prompt]], max_new_tokens: int
    ) -> Answers:
        """Return the answers to all turns: turn by turn, in batches of like length."""
        answers: Answers = [[] for _ in prompts]
        for turn in range(max(len(item) for item in prompts)):
            going = [index for index, item in enumerate(prompts) if turn < len(item)]
            lengths = [
                sum(len(prompt.ids) for prompt in prompts[index][: turn + 1])
                + sum(len(answer) for answer in answers[index])
                + max_new_tokens
                for index in going
            ]
            for group in decoding.batches(lengths, self._max_batch, self._max_tokens):
                chosen = [going[position] for position in group]
                read = [
                    models.read(prompts[i][: turn + 1], self._written(answers[i])) for i in chosen
                ]
                written = decoding.write(
                    models.writer,
                    [cache for cache, _ in read],
                    [last_id for _, last_id in read],
                    max_new_tokens,
                    self._tokenizer.eos_token_ids,
                )
                for index, answer in zip(chosen, written, strict=True):
                    answers[index].append(answer)
        return answers

    def _written(self, answers: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return answers without the id that ended them: it begins the next prompt."""
        ends = self._tokenizer.eos_token_ids
        return [answer[:-1] if answer[-1] in ends else answer for answer in answers]

    def _judge(
        self, items: Sequence[Item], answers: Answers, pool: concurrent.futures.Executor
    ) -> "dict[str, concurrent.futures.Future[float]]":
        outcomes = {}
        for item, written in zip(items, answers, strict=True):
            for number, (turn, ids) in enumerate(zip(item.turns, written, strict=True), start=1):
                if turn.judge is not None:
                    name = item.name if len(item.turns) == 1 else f"{item.name}/{number}"
                    text = answer_text(ids, self._tokenizer)
                    outcomes[name] = pool.submit(turn.judge.verdict, text)
        return outcomes

    def _compare(
        self,
        unit: Unit,
        models: "Models",
        prompts: Sequence[list[Prompt]],
        answers: Sequence[list[int]],
        kind: str,
    ) -> fidelity.TokenFigures:
        prompts = prompts[: len(answers)]
        key = (unit.set_name, kind, len(answers))
        if key not in self._whole_hidden:
            whole = models if unit.row.name == WHOLE else Models(self._parts, Row(WHOLE), "")
            self._whole_hidden[key] = whole.states(prompts, answers)
        reference = self._whole_hidden[key]
        row = reference if unit.row.name == WHOLE else models.states(prompts, answers)
        tokens = fidelity.compare(models.writer, row, self._whole, reference, answers)
        self._results.save_tokens(unit, kind, tokens)
        return tokens


class Models:
    """The models of a row on the prompts of one task.

    Args:
        parts: of the model.
        row: who reads and who writes.
        task: of the set.
        keep_tokens: first prompts that have been read are kept, up to so many tokens: they are
            answered, and scored with given answers.
    """

    def __init__(self, parts: PartMaker, row: Row, task: str, keep_tokens: int = 0):
        self._keep_tokens = keep_tokens
        self._kept: dict[tuple[int, ...], tuple[decoding.Cache, int]] = {}
        self._parts = parts
        self._row = row
        self._by_block = row.part.units == "block" and row.part.kept < 1
        uses_part = "part" in (row.read, row.write)
        self.part = parts.fixed(row.part, task) if uses_part and not self._by_block else None
        self.num_kept_units = parts.num_units
        if uses_part and row.part.kept < 1:
            self.num_kept_units = parts.num_kept_units(row.part.kept)
        self.writer: nn.Module = parts.whole
        if row.write == "part" and self.part is not None:
            self.writer = self.part

    def read(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
    ) -> tuple[decoding.Cache, int]:
        """Return the cache of a conversation without its last token, and that token.

        The cache of a first prompt is not the caller's own: it must be left as it is.
        """
        ids = prompts[0].ids
        if not answers and ids in self._kept:
            return self._kept[ids]
        segments, last_id = decoding.plan_reading(prompts, answers, self._row.reading)
        planned = [(self._reader(s.reader, segments), s.ids) for s in segments]
        cache = decoding.read(planned, len(self._parts.whole.layers))
        if not answers and len(ids) <= self._keep_tokens:
            self._kept[ids] = cache, last_id
            self._keep_tokens -= len(ids)
        return cache, last_id

    def states(
        self, prompts: Sequence[list[Prompt]], answers: Sequence[Sequence[int]]
    ) -> list[mx.array]:
        """Return the (T, D) states from which the writer would write each given answer."""
        states = []
        for prompt, answer in zip(prompts, answers, strict=True):
            cache, last_id = self.read(prompt, ())
            hidden = decoding.answer_hidden(self.writer, cache, last_id, answer)
            mx.async_eval(hidden)
            for layer in cache:
                layer.trim(len(answer))
            states.append(hidden)
        mx.eval(states)
        return states

    def _reader(self, reader: Reader, segments: Sequence[decoding.Segment]) -> nn.Module:
        if reader is Reader.WHOLE or (reader is Reader.READ and self._row.read == "whole"):
            return self._parts.whole
        if reader is Reader.WRITE:
            return self.writer
        if self._by_block:
            return self._parts.by_block(self._row.part, segments[0].ids)
        assert self.part is not None
        return self.part


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start

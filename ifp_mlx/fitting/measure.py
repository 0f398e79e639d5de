"""Measuring candidates on a task's examples, and giving up those that are plainly lost."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.chat_template import chat_ids
from ifp_mlx.convert.quantize import make_quantization, quantize_model
from ifp_mlx.errors import DataError
from ifp_mlx.fitting.answers import write_answer, write_answers
from ifp_mlx.fitting.candidates import Candidate, candidates
from ifp_mlx.fitting.fidelity import Comparison, Fidelity, Reference
from ifp_mlx.fitting.judge import CommandJudge
from ifp_mlx.fitting.results import LOST_CHANGED, FitRecord, Measured
from ifp_mlx.selection.selection import Selection
from ifp_mlx.subnets.subnetwork import SubNetwork
from ifp_mlx.text.task_examples import TaskExample
from ifp_mlx.units.modules import clone_module, stored_bytes, unit_arrays

FIRST_LOOK = 3
"""So many answers show whether a candidate is plainly lost."""

_SPEED_TOKENS = 32

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Halves:
    """A task's examples, divided.

    Attributes:
        selecting: choose units along with the description.
        measuring: what candidates are measured on.
    """

    selecting: tuple[TaskExample, ...]
    measuring: tuple[TaskExample, ...]

    @classmethod
    def of(cls, examples: Sequence[TaskExample], limit: int) -> "Halves":
        """Divide examples in turns, each prompt once.

        Args:
            examples: in the user's order.
            limit: the most to measure on.

        Raises:
            DataError: there are fewer than two different prompts.
        """
        distinct = list({example.prompt: example for example in examples}.values())
        if len(distinct) < 2:
            raise DataError(
                "one example cannot both select and measure; give at least two, better twenty"
            )
        return cls(tuple(distinct[0::2]), tuple(distinct[1::2][:limit]))


class Fit:
    """One task on one model.

    Args:
        assistant: of the model; it caches nothing.
        task: the description.
        halves: of its examples.
        record: where results go, and where those of an earlier run come from.
        judge: the user's check, if there is one.
        max_tokens: the longest answer.

    Raises:
        DataError: the model does not fit in memory, and the examples have no answers.
    """

    def __init__(
        self,
        assistant: Assistant,
        task: str,
        halves: Halves,
        record: FitRecord,
        *,
        judge: CommandJudge | None = None,
        max_tokens: int = 128,
    ):
        self.record = record
        self._assistant = assistant
        self._task = task
        self._halves = halves
        self._judge = judge
        self._max_tokens = max_tokens
        self._references: list[tuple[TaskExample, Reference]] = []
        self._selections: dict[int, Selection] = {}
        self._lost: list[Candidate] = []
        if not assistant.keeps_whole and any(e.answer is None for e in halves.measuring):
            raise DataError(
                "the whole model does not fit in memory, so it cannot answer the examples itself; "
                'give each an "answer"'
            )

    def candidates(self) -> list[Candidate]:
        """Return what will be measured, in order."""
        assistant = self._assistant
        bits = _stored_bits(assistant.files.config.content)
        found = candidates(assistant.amounts, bits, is_mixture=assistant.kind.router is not None)
        return [candidate for candidate in found if self._can_be_made(candidate)]

    def run(self, progress: Progress = lambda name, done, total: None) -> Iterator[Measured]:
        """Measure every candidate that is not known yet, and yield each as it is done. Evaluates.

        Args:
            progress: called with what is measured, examples done, and all of them.
        """
        found = self.candidates()
        seconds: list[float] = []
        for number, candidate in enumerate(found, start=1):
            measured = self.record.get(candidate)
            if measured is None and not any(candidate.is_below(lost) for lost in self._lost):
                where = f"{number}/{len(found)}{_time_left(seconds, len(found) - number + 1)}"
                start = time.perf_counter()
                measured = self._measure(candidate, _prefixed(progress, where))
                seconds.append(time.perf_counter() - start)
                self.record.add(measured)
            if measured is not None:
                if measured.is_lost:
                    self._lost.append(candidate)
                yield measured

    def _can_be_made(self, candidate: Candidate) -> bool:
        is_whole = candidate.num_kept_units == self._assistant.num_units
        if candidate.only_reads:  # what an adapter changed cannot share keys with the whole model
            return self._assistant.keeps_whole and not self._assistant.files.is_adapted
        return not (is_whole and candidate.bits is not None) or self._assistant.keeps_whole

    def _is_adapted(self, candidate: Candidate) -> bool:
        is_part = candidate.num_kept_units < self._assistant.num_units
        return is_part and self._assistant.files.is_adapted

    def _measure(self, candidate: Candidate, progress: Progress) -> Measured:
        label = candidate.label(self._assistant.amounts)
        if not self._references:
            self._references = self._make_references(progress)
        num_examples = len(self._references)
        is_whole = candidate == Candidate(self._assistant.num_units)
        if is_whole and not self._assistant.keeps_whole:
            fidelity = Fidelity.of([Comparison.same(one) for _, one in self._references])
            return self._measured(candidate, fidelity)
        subnet, packed_bytes = self._make(candidate)
        model = self._assistant.converse(subnet).model
        compared: list[Comparison] = []
        for number, (_, reference) in enumerate(self._references, start=1):
            compared.append(
                Comparison.same(reference) if is_whole else Comparison.of(model, reference)
            )
            is_far = Fidelity.of(compared).changed > LOST_CHANGED
            if number == FIRST_LOOK and is_far and not self._is_adapted(candidate):
                progress(label, num_examples, num_examples)
                measured = self._measured(candidate, Fidelity.of(compared), subnet, packed_bytes)
                return dataclasses.replace(measured, is_lost=True)
            progress(label, number - (number == num_examples), num_examples)
        prompt_ids = self._references[0][1].prompt_ids
        _, stats = write_answer(model, self._assistant, prompt_ids, _SPEED_TOKENS)
        measured = dataclasses.replace(
            self._measured(candidate, Fidelity.of(compared), subnet, packed_bytes),
            tokens_per_s=stats.generation_tps,
            first_token_s=stats.time_to_first_token_s,
        )
        if self._judge is not None:
            answers = self._answers_as_far_as_changed(candidate, model, compared)
            examples = [example for example, _ in self._references]
            right = sum(map(self._judge.is_right, examples, answers))
            measured = dataclasses.replace(measured, num_right=right, num_checked=num_examples)
        progress(label, num_examples, num_examples)
        return measured

    def _make_references(self, progress: Progress) -> list[tuple[TaskExample, Reference]]:
        """Return the whole model's answers, or the given ones if it cannot answer here."""
        assistant, examples = self._assistant, self._halves.measuring
        prompts = [chat_ids(assistant.tokenizer, _messages(example)) for example in examples]
        name, num_examples = "the whole model's answers", len(examples)
        if assistant.keeps_whole:
            model = assistant.dense().model
            answers = write_answers(
                model,
                assistant,
                prompts,
                [self._max_tokens] * num_examples,
                lambda done: progress(name, done - (done == num_examples), num_examples),
            )
        else:
            model = assistant.reader
            answers = [
                assistant.tokenizer.encode(example.answer, add_special_tokens=False)
                for example in examples
            ]
        references = [
            (example, Reference.of(model, prompt_ids, answer_ids[: self._max_tokens]))
            for example, prompt_ids, answer_ids in zip(examples, prompts, answers, strict=True)
            if answer_ids
        ]
        progress(name, num_examples, num_examples)
        if not references:
            raise DataError("the whole model answers none of the examples; look at them")
        return references

    def _make(self, candidate: Candidate) -> tuple[SubNetwork, int]:
        """Return what a candidate answers with, and its bytes on disk if its bits are fewer."""
        assistant, kept = self._assistant, candidate.num_kept_units
        subnet = assistant.dense() if kept == assistant.num_units else self._part(kept)
        if candidate.only_reads:
            return dataclasses.replace(assistant.dense(), task=self._task, reader=subnet), 0
        if candidate.bits is None:
            return subnet, 0
        model, packed_bytes = with_fewer_bits(subnet.model, candidate.bits)
        return dataclasses.replace(subnet, model=model), packed_bytes

    def _part(self, num_kept_units: int) -> SubNetwork:
        """Return the sub-network of the task. Evaluates."""
        assistant, selections = self._assistant, self._selections
        if num_kept_units not in selections:
            selections[num_kept_units] = assistant.select_for(
                self._task, num_kept_units, self._halves.selecting
            )
        return assistant.subnetwork_of(selections[num_kept_units])

    def _measured(
        self,
        candidate: Candidate,
        fidelity: Fidelity,
        subnet: SubNetwork | None = None,
        packed_bytes: int = 0,
    ) -> Measured:
        assistant, kept = self._assistant, candidate.num_kept_units
        prediction = assistant.predict_memory(kept)
        memory_bytes = prediction.total_bytes
        disk_bytes = assistant.stored_bytes(kept)
        if candidate.only_reads:
            assert subnet is not None
            assert subnet.reader is not None
            memory_bytes = assistant.predict_memory(assistant.num_units).total_bytes
            memory_bytes += sum(a.nbytes for a in unit_arrays(subnet.reader.model).values())
            disk_bytes = assistant.stored_bytes(assistant.num_units)
        elif candidate.bits is not None:
            assert subnet is not None
            weights_bytes = stored_bytes(subnet.model)
            memory_bytes += weights_bytes - prediction.weights_bytes
            disk_bytes = packed_bytes
        is_adapted = self._is_adapted(candidate)
        return Measured(candidate, disk_bytes, memory_bytes, fidelity, is_adapted=is_adapted)

    def _answers_as_far_as_changed(
        self, candidate: Candidate, model: nn.Module, compared: Sequence[Comparison]
    ) -> list[str]:
        """Return a candidate's answers; they go on where they differ from the whole model's own.

        What reads with a part answers from the beginning: the whole model's words are no prompt.
        """
        tokenizer = self._assistant.tokenizer
        can_go_on = self._assistant.keeps_whole and not candidate.only_reads
        begun, prompts, limits = [], [], []
        for (_, reference), found in zip(self._references, compared, strict=True):
            same = reference.answer_ids[: found.same_tokens] if can_go_on else ()
            has_ended = bool(same) and same[-1] in tokenizer.eos_token_ids
            begun.append(same)
            prompts.append((*reference.prompt_ids, *same))
            limits.append(0 if has_ended else self._max_tokens - len(same))
        rests = write_answers(model, self._assistant, prompts, limits)
        return [
            str(tokenizer.decode([*same, *rest], skip_special_tokens=True))
            for same, rest in zip(begun, rests, strict=True)
        ]


def with_fewer_bits(model: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """Return a model whose matrices are rounded to fewer bits, and what it takes on a disk.

    On the CPU, where mlx multiplies packed matrices slowly, they are unpacked again, as they are
    when such a checkpoint is loaded.
    """
    from mlx_lm.utils import dequantize_model

    packed = dequantize_model(clone_module(model))
    quantize_model(packed, {}, make_quantization(bits=bits))
    num_bytes = stored_bytes(packed)
    if mx.default_device() == mx.cpu:
        packed = dequantize_model(packed)
        packed.set_dtype(mx.float32)
    mx.eval(packed.parameters())
    return packed, num_bytes


def _prefixed(progress: Progress, where: str) -> Progress:
    return lambda name, done, total: progress(f"{where} {name}", done, total)


def _time_left(seconds: Sequence[float], num_left: int) -> str:
    """Return what the rest will take if none is given up, once there is one to go by."""
    if not seconds:
        return ""
    return f", about {math.ceil(statistics.median(seconds) * num_left / 60)} min left:"


def _stored_bits(config: Mapping[str, Any]) -> int:
    """Return the narrowest width of the checkpoint's matrices: in memory they may be unpacked."""
    quantization = config.get("quantization") or {}
    packings = [quantization, *(v for v in quantization.values() if isinstance(v, dict))]
    return min((int(packing["bits"]) for packing in packings if "bits" in packing), default=16)


def _messages(example: TaskExample) -> list[dict[str, str]]:
    return [{"role": "user", "content": example.prompt}]

"""Measuring candidates on a task's examples: those that select are never those that measure."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.generation import GenerationStats
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.convert.quantize import make_quantization, quantize_model
from ifp_mlx.errors import DataError
from ifp_mlx.fitting.candidates import Candidate, candidates
from ifp_mlx.fitting.fidelity import Fidelity, Reference, measure_fidelity
from ifp_mlx.fitting.judge import CommandJudge
from ifp_mlx.fitting.results import LOST_SURE_FLIPS, FitRecord, Measured
from ifp_mlx.storage.tokenizer import chat_ids
from ifp_mlx.subnets.subnetwork import SubNetwork
from ifp_mlx.text.task_examples import TaskExample
from ifp_mlx.units.modules import clone_module, packed_leaves, stored_bytes, unit_arrays

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
        self._sampling = SamplingOptions(max_new_tokens=max_tokens)
        self._references: list[Reference] = []
        self._lost: list[Candidate] = []
        self._packed_bytes = 0  # of the candidate of fewer bits that was made last
        if not assistant.keeps_whole and any(e.answer is None for e in halves.measuring):
            raise DataError(
                "the whole model does not fit in memory, so it cannot answer the examples itself; "
                'give each an "answer"'
            )

    def candidates(self) -> list[Candidate]:
        """Return what will be measured, in order."""
        assistant = self._assistant
        packings = packed_leaves(assistant.skeleton).values()
        bits = min((int(packing["bits"]) for packing in packings), default=16)
        found = candidates(assistant.amounts, bits, is_mixture=assistant.kind.router is not None)
        return [candidate for candidate in found if self._can_be_made(candidate)]

    def run(self, progress: Progress = lambda name, done, total: None) -> Iterator[Measured]:
        """Measure every candidate that is not known yet, and yield each as it is done. Evaluates.

        Args:
            progress: called with what is measured, examples done, and all of them.
        """
        for candidate in self.candidates():
            measured = self.record.get(candidate)
            if measured is None and not any(candidate.is_below(lost) for lost in self._lost):
                measured = self._measure(candidate, progress)
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

    def _measure(self, candidate: Candidate, progress: Progress) -> Measured:
        label = candidate.label(self._assistant.amounts)
        examples = self._halves.measuring
        if not self._references:
            self._references = self._make_references(progress)
        is_whole = candidate == Candidate(self._assistant.num_units)
        if is_whole and not self._assistant.keeps_whole:
            return self._measured(candidate, None, Fidelity(1.0, 0.0, self._most_tokens()))
        subnet = self._make(candidate)
        model = self._assistant.converse(subnet).model
        fidelity = measure_fidelity(model, self._references[:FIRST_LOOK])
        is_lost = fidelity.sure_flips > LOST_SURE_FLIPS
        if is_lost:
            progress(label, len(examples), len(examples))
            return dataclasses.replace(self._measured(candidate, subnet, fidelity), is_lost=True)
        fidelity = measure_fidelity(model, self._references)
        measured = self._measured(candidate, subnet, fidelity)
        right, speeds, waits = 0, [], []
        for number, example in enumerate(examples if self._judge else examples[:1], start=1):
            answer, stats = self._answer(subnet, example)
            right += self._judge is not None and self._judge.is_right(example, answer)
            if stats is not None:
                speeds.append(stats.generation_tps)
                waits.append(stats.time_to_first_token_s)
            progress(label, number if self._judge else len(examples), len(examples))
        return dataclasses.replace(
            measured,
            tokens_per_s=sum(speeds) / len(speeds) if speeds else None,
            first_token_s=sum(waits) / len(waits) if waits else None,
            num_right=right if self._judge else None,
            num_checked=len(examples) if self._judge else 0,
        )

    def _make_references(self, progress: Progress) -> list[Reference]:
        """Return the whole model's answers, or the given ones if it cannot answer here."""
        assistant, examples = self._assistant, self._halves.measuring
        references = []
        for number, example in enumerate(examples, start=1):
            prompt_ids = chat_ids(assistant.tokenizer, _messages(example))
            if assistant.keeps_whole:
                whole = assistant.dense()
                conversation = assistant.converse(whole)
                for _ in conversation.reply(_messages(example), self._sampling):
                    pass
                answer_ids = conversation.kv_cache.token_ids[len(prompt_ids) :]
                model = whole.model
            else:
                answer_ids = assistant.tokenizer.encode(example.answer, add_special_tokens=False)
                answer_ids = answer_ids[: self._sampling.max_new_tokens]
                model = assistant.reader
            if answer_ids:
                references.append(Reference.of(model, prompt_ids, answer_ids))
            progress("the whole model's answers", number, len(examples))
        if not references:
            raise DataError("the whole model answers none of the examples; look at them")
        return references

    def _most_tokens(self) -> float:
        return float(max(len(reference.answer_ids) for reference in self._references))

    def _make(self, candidate: Candidate) -> SubNetwork:
        """Return what a candidate answers with. Evaluates."""
        assistant, kept = self._assistant, candidate.num_kept_units
        subnet = assistant.subnetwork_for_task(self._task, kept, self._halves.selecting)
        if candidate.only_reads:
            return dataclasses.replace(assistant.dense(), task=self._task, reader=subnet)
        if candidate.bits is None:
            return subnet
        model, self._packed_bytes = with_fewer_bits(subnet.model, candidate.bits)
        return dataclasses.replace(subnet, model=model)

    def _measured(
        self, candidate: Candidate, subnet: SubNetwork | None, fidelity: Fidelity
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
            disk_bytes = self._packed_bytes
        return Measured(candidate, disk_bytes, memory_bytes, fidelity)

    def _answer(
        self, subnet: SubNetwork, example: TaskExample
    ) -> tuple[str, GenerationStats | None]:
        conversation = self._assistant.converse(subnet)
        sampling = self._sampling
        if self._judge is None:
            sampling = dataclasses.replace(sampling, max_new_tokens=_SPEED_TOKENS)
        answer = "".join(conversation.reply(_messages(example), sampling))
        return answer, conversation.stats


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


def _messages(example: TaskExample) -> list[dict[str, str]]:
    return [{"role": "user", "content": example.prompt}]

"""Parts of a model: which units they keep, how they are cut, how their weights are rounded.

Units are chosen and cut by ``ifp_mlx`` itself. Fewer bits are simulated: each
matrix is quantized as mlx-lm does it (affine, groups of 64) and at once dequantized, so that rows
of any number of bits run at the speed of plain weights and need no kernel for packed ones. The
values are those of the packed model; sums differ in the last place of bfloat16.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from prompts import Item, Message, Tokenizer, Turn, answer_ids, prompts_of
from sets import SEED, Data, Record

from ifp_mlx.selection.calibration import Calibration, CalibrationExample, calibrate
from ifp_mlx.selection.selectors import select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.subnets.selectors import SelectorFiles, make_selector
from ifp_mlx.units.modules import clone_module, named_arrays, unit_shape

Units = Literal["static", "task", "block", "random"]
"""By the prior over all tasks, by the prior of the set's task, by each prompt's own first block
(GRIFFIN's statistic), at random."""

_SELECTORS: dict[Units, str] = {
    "static": "static",
    "task": "static:{task}",
    "block": "prompt",
    "random": f"random:{SEED}",
}

KERNEL_MULTIPLE = 64
GROUP_SIZE = 64
WHOLE_BITS = 16
CALIBRATION_TOKENS = 512
_KEPT_PARTS = 8

_SOURCES: dict[str, tuple[str, ...]] = {
    "coding": ("docstring", "gpteacher-codegen", "mbpp-train", "exercism-python"),
    "math": ("gsm8k-train", "svamp"),
    "sql": ("wikisql",),
    "tool_use": ("bfcl",),
    "qa": ("t0",),
    "summarisation": ("t0",),
}
"""Of each calibrated task: the training sources whose form is that of the function sets."""


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """What a part keeps.

    Attributes:
        units: how they are chosen.
        kept: share of the FFN units, 1 for all.
        bits: of all matrices; 16 leaves them as they are.
    """

    units: Units = "static"
    kept: float = 1.0
    bits: int = WHOLE_BITS

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole model, unchanged."""
        return self.kept == 1 and self.bits == WHOLE_BITS


class PartMaker:
    """Makes the parts of one model; calibrates once, and keeps the last few parts.

    Args:
        model: the whole model.
        tokenizer: its own.
        data: for calibration text; the training half only.
        calibration_file: read if it is there, else written.
        num_examples: calibration examples a task.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        data: Data,
        calibration_file: Path,
        num_examples: int,
    ):
        self.whole = model
        self.num_units = unit_shape(model).num_units
        self._tokenizer = tokenizer
        self._data = data
        self._calibration_file = calibration_file
        self._num_examples = num_examples
        self._by_spec: dict[tuple[PartSpec, str], nn.Module] = {}

    def num_kept_units(self, kept: float) -> int:
        """Return K: a multiple of 64 near a share of F."""
        return max(round(kept * self.num_units / KERNEL_MULTIPLE), 1) * KERNEL_MULTIPLE

    def fixed(self, spec: PartSpec, task: str) -> nn.Module:
        """Return a part that is the same for every prompt of a task. Evaluates."""
        if spec.is_whole:
            return self.whole
        key = (spec, task if spec.units == "task" and spec.kept < 1 else "")
        if key not in self._by_spec:
            while len(self._by_spec) >= _KEPT_PARTS:
                del self._by_spec[next(iter(self._by_spec))]
            self._by_spec[key] = self._make(spec, task)
        return self._by_spec[key]

    def by_block(self, spec: PartSpec, block: Sequence[int]) -> nn.Module:
        """Return the part of the units that a block of tokens activates most."""
        return self._cut(spec, "", block)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What the whole model's units do on training text of the tasks. Evaluates."""
        if not self._calibration_file.exists():
            examples = list(self._calibration_examples())
            calibrate(self.whole, examples).save(self._calibration_file)
        return Calibration.load(self._calibration_file)

    def _make(self, spec: PartSpec, task: str) -> nn.Module:
        part = self._cut(spec, task, ())
        mx.eval(part.parameters())
        return part

    def _cut(self, spec: PartSpec, task: str, ids: Sequence[int]) -> nn.Module:
        part = self.whole
        if spec.kept < 1:
            wanted = SelectorSpec.parse(_SELECTORS[spec.units].format(task=task))
            needs_calibration = wanted.name == "static"
            files = SelectorFiles(calibration=self.calibration if needs_calibration else None)
            selector = make_selector(wanted, self.whole, files)
            part = slice_model(self.whole, select(selector, ids, self.num_kept_units(spec.kept)))
        return part if spec.bits == WHOLE_BITS else with_rounded_weights(part, spec.bits)

    def _calibration_examples(self) -> list[CalibrationExample]:
        examples = []
        for task, sources in _SOURCES.items():
            fitting = [r for r in self._data.training(task) if r["source"].startswith(sources)]
            chosen = random.Random(SEED + 1).sample(fitting, min(self._num_examples, len(fitting)))
            for record in chosen:
                ids = _training_ids(record, self._tokenizer)[:CALIBRATION_TOKENS]
                examples.append(CalibrationExample(ids, task))
        return examples


def with_rounded_weights(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy of a model of plain weights with every matrix rounded to a few bits. Lazy.

    Rounds what ``mlx_lm.utils.quantize_model`` would pack, the embedding included.
    """
    copy: nn.Module = clone_module(model)
    for _, module in copy.named_modules():
        if _is_rounded(module):
            # Columns that mx.take gathered on CUDA lie the other way round, and there mx.quantize
            # reads them as if they did not (mlx 0.32.4).
            plain = mx.contiguous(module.weight)
            packed = mx.quantize(plain, group_size=GROUP_SIZE, bits=bits)
            module.weight = mx.dequantize(*packed, group_size=GROUP_SIZE, bits=bits).astype(
                module.weight.dtype
            )
    return copy


def packed_bytes(model: nn.Module, bits: int) -> int:
    """Return the size of a model whose matrices are packed in ``bits``; 16 bits elsewhere."""
    total = sum(array.size for array in named_arrays(model).values()) * 2
    if bits == WHOLE_BITS:
        return int(total)
    for _, module in model.named_modules():
        if _is_rounded(module):
            size = module.weight.size
            total += size * bits // 8 + size // GROUP_SIZE * 4 - size * 2
    return int(total)


def _is_rounded(module: nn.Module) -> bool:
    is_matrix = isinstance(module, nn.Linear | nn.Embedding)
    return is_matrix and module.weight.shape[-1] % GROUP_SIZE == 0


def _training_ids(record: Record, tokenizer: Tokenizer) -> list[int]:
    """Return prompt and response as the model reads and writes them."""
    turn = Turn((Message("user", record["prompt"]),), None)
    item = Item("calibration", (turn,))
    prompt = prompts_of(item, tokenizer)[0]
    return [*prompt.ids, *answer_ids(record["response"], item, tokenizer)]

"""What a task could be answered with: the whole model, parts of it, fewer bits."""

import dataclasses
from collections.abc import Iterator

from ifp_mlx.assistant import DEFAULT_READING_RATIO
from ifp_mlx.units.amounts import Amounts

BITS = (8, 6, 5, 4, 3)
FFN_RATIOS = (0.95, 0.9, 0.8, 0.67, 0.5)
EXPERT_RATIOS = (0.875, 0.75, 0.625, 0.5)
PART_BITS = 4
"""Parts are tried at this width as well."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to answer.

    Attributes:
        num_kept_units: K; F is the whole model.
        bits: of its matrices; None as the source has them.
        only_reads: the part reads prompts, the whole model writes.
    """

    num_kept_units: int
    bits: int | None = None
    only_reads: bool = False

    @property
    def key(self) -> str:
        """A name for files."""
        bits = "source" if self.bits is None else str(self.bits)
        return f"{self.num_kept_units}@{bits}" + ("-reads" if self.only_reads else "")

    def label(self, amounts: Amounts) -> str:
        """Return what people read."""
        share = self.num_kept_units / amounts.num_units
        if self.num_kept_units == amounts.num_units:
            name = "whole model"
        else:
            name = f"{share:.0%} of the {amounts.label}"
        if self.only_reads:
            return f"whole model, read with {name}"
        return name if self.bits is None else f"{name}, {self.bits} bits"

    def is_below(self, other: "Candidate") -> bool:
        """Return whether this is another one with still less: fewer units, or fewer bits."""
        if self.only_reads or other.only_reads or self == other:
            return False
        bits, others = self.bits or 16, other.bits or 16
        return self.num_kept_units <= other.num_kept_units and bits <= others


def candidates(amounts: Amounts, source_bits: int, *, is_mixture: bool) -> Iterator[Candidate]:
    """Yield what is worth measuring, from most to least.

    Args:
        amounts: of units that can be kept.
        source_bits: of the checkpoint's matrices; 16 for plain ones.
        is_mixture: the units are experts.
    """
    whole = amounts.num_units
    yield Candidate(whole)
    ratios = EXPERT_RATIOS if is_mixture else FFN_RATIOS
    parts = dict.fromkeys(amounts.nearest(ratio) for ratio in ratios)
    parts.pop(whole, None)
    if not is_mixture:
        yield Candidate(amounts.nearest(DEFAULT_READING_RATIO), only_reads=True)
    for bits in BITS:
        if bits < source_bits:
            yield Candidate(whole, bits)
    for kept in parts:
        yield Candidate(kept)
        if source_bits > PART_BITS:
            yield Candidate(kept, PART_BITS)

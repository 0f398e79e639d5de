"""Amounts of units that a model can be cut to, checked and rounded in one place."""

import dataclasses
import math

from ifp_mlx.errors import UsageError
from ifp_mlx.units.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How many units a layer a sub-network can keep: all, or a multiple within bounds.

    Attributes:
        num_units: F.
        multiple: what others are multiples of.
        least: the fewest, a multiple.
        label: what people call the units.
    """

    num_units: int
    multiple: int
    least: int
    label: str

    @classmethod
    def of(cls, config: ModelConfig, num_units: int) -> "Amounts":
        """Return the amounts for a model: of experts, enough for its router to choose from."""
        kind = config.family.kind
        if kind.router is None:
            return cls(num_units, kind.multiple, min(kind.multiple, num_units), kind.label)

        def setting(key: str | None) -> int:
            return int((config.settings.get(key) if key is not None else None) or 1)

        chosen, groups = setting(kind.router.chosen), setting(kind.router.groups)
        least = chosen
        if groups > 1:
            # A group is scored by its best two, and a token's experts are in some groups only.
            in_group = max(2, math.ceil(chosen / setting(kind.router.chosen_groups)))
            least = groups * in_group
        return cls(num_units, groups, min(least, num_units), kind.label)

    def nearest(self, keep_ratio: float) -> int:
        """Return K: a ratio of F, rounded to the nearest amount. A ratio of 1 keeps every unit.

        Raises:
            UsageError: the ratio is not in (0, 1].
        """
        if not 0.0 < keep_ratio <= 1.0:
            raise UsageError(f"`keep_ratio` must be above 0 and at most 1, not {keep_ratio:g}")
        if keep_ratio == 1.0:
            return self.num_units
        rounded = round(keep_ratio * self.num_units / self.multiple) * self.multiple
        return min(max(rounded, self.least), self.num_units)

    def check(self, num_kept_units: int) -> int:
        """Return an amount if a sub-network can keep it.

        Raises:
            UsageError: with the nearest amounts that it can.
        """
        if num_kept_units == self.num_units:
            return num_kept_units
        if not self.least <= num_kept_units <= self.num_units:
            raise UsageError(
                f"`keep_units` must be between {self.least} and {self.num_units} {self.label}, "
                f"not {num_kept_units}"
            )
        if num_kept_units % self.multiple:
            below = num_kept_units // self.multiple * self.multiple
            around = (below, below + self.multiple)
            nearest = [amount for amount in around if self.least <= amount <= self.num_units]
            raise UsageError(
                f"`keep_units` must be a multiple of {self.multiple} or {self.num_units}; "
                f"nearest to {num_kept_units}: {' or '.join(map(str, nearest))}"
            )
        return num_kept_units

    def descending(self) -> list[int]:
        """Return every amount, F first."""
        largest = (self.num_units - 1) // self.multiple * self.multiple
        return [self.num_units, *range(largest, self.least - 1, -self.multiple)]

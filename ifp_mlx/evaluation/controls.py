"""Masks for the rows of a table: one an input, one a task, and the controls made from them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifp_mlx.errors import UsageError
from ifp_mlx.evaluation.quality import HeldOutExample
from ifp_mlx.selection.selectors import NamedSelector
from ifp_mlx.selection.top_k import top_k_indices

Instruction = tuple[NamedSelector, tuple[int, ...]]
"""What selects for an example: a selector, and the token ids that it reads."""


@dataclasses.dataclass(frozen=True)
class UnitMasks:
    """The units that each of some examples keeps; called with a batch, their masks.

    Attributes:
        examples: E of them.
        kept: (E, L, F) bool.
        num_groups: into how many groups units are divided, as many of which are kept in each.
    """

    examples: Sequence[HeldOutExample]
    kept: npt.NDArray[np.bool_]
    num_groups: int = 1

    def __call__(self, batch: Sequence[HeldOutExample]) -> mx.array:
        """Return the (B, L, F) float32 masks of a batch of the examples."""
        return mx.array(np.stack([self.of(example) for example in batch]).astype(np.float32))

    def of(self, example: HeldOutExample) -> npt.NDArray[np.bool_]:
        """Return the (L, F) mask of one of the examples."""
        kept: npt.NDArray[np.bool_] = self.kept[self._positions[example]]
        return kept

    @functools.cached_property
    def _positions(self) -> dict[HeldOutExample, int]:
        return {example: index for index, example in enumerate(self.examples)}

    def indices_of(self, example: HeldOutExample) -> mx.array:
        """Return the (L, K) int32 units of one of the examples."""
        kept = self.of(example)
        return mx.array(np.nonzero(kept)[1].reshape(kept.shape[0], -1).astype(np.int32))

    def fixed(self) -> "UnitMasks":
        """Return the mean mask for every example: the K units a layer that most of them keep.

        It holds what the masks have in common, so that only what depends on the input is gone.
        """
        frequency = mx.array(self.kept.astype(np.float32).mean(axis=0))  # (L, F)
        num_kept_units = int(self.kept[0, 0].sum())
        mean = _mask(frequency, [num_kept_units], self.num_groups)[0]
        return dataclasses.replace(self, kept=np.broadcast_to(mean, self.kept.shape))

    def shuffled(self, seed: int = 0) -> "UnitMasks":
        """Return a mask of an example of another domain for every example.

        Raises:
            UsageError: the examples are all of one domain.
        """
        rng = np.random.default_rng(seed)
        domains = np.array([example.domain for example in self.examples])
        givers = []
        for domain in domains:
            others = np.flatnonzero(domains != domain)
            if not others.size:
                raise UsageError("shuffled masks need text of at least two domains")
            givers.append(int(rng.choice(others)))
        return dataclasses.replace(self, kept=self.kept[givers])


def unit_masks(
    examples: Sequence[HeldOutExample],
    instruction: Callable[[HeldOutExample], Instruction],
    amounts: Iterable[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, UnitMasks]:
    """Return K -> the masks of all examples. Evaluates.

    Each different instruction is scored once, whatever the number of examples and of Ks.

    Args:
        examples: what is to be measured.
        instruction: what selects for an example.
        amounts: the Ks.
        progress: called with (examples done, all).

    Raises:
        SelectionError: a K is out of range.
    """
    kept_units = sorted(set(amounts))
    known: dict[tuple[str, tuple[int, ...]], list[npt.NDArray[np.bool_]]] = {}
    rows: list[list[npt.NDArray[np.bool_]]] = []
    for number, example in enumerate(examples, start=1):
        named, token_ids = instruction(example)
        key = (str(named.spec), token_ids)
        if key not in known:
            scores = named.selector.scores([token_ids])[0]
            known[key] = _mask(scores, kept_units, named.num_groups)
        rows.append(known[key])
        progress(number, len(examples))
    return {
        num_kept: UnitMasks(examples, np.stack([row[index] for row in rows]), named.num_groups)
        for index, num_kept in enumerate(kept_units)
    }


def _mask(
    scores: mx.array, amounts: Sequence[int], num_groups: int = 1
) -> list[npt.NDArray[np.bool_]]:
    """Return one (L, F) bool mask for each K, by the very function that selections come from."""
    masks = []
    for num_kept_units in amounts:
        indices = np.array(top_k_indices(scores, num_kept_units, num_groups))
        mask = np.zeros(scores.shape, dtype=np.bool_)
        np.put_along_axis(mask, indices, True, axis=-1)
        masks.append(mask)
    return masks

"""The registry of selectors: what each needs, what it reads, its version, how it is made."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import mlx.nn as nn

from ifp_mlx.adapters.adapter import Adapter
from ifp_mlx.errors import UsageError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.expert_statistics import CRITERIA
from ifp_mlx.selection.predictor import HEAD_TOKENS, TAIL_TOKENS
from ifp_mlx.selection.selectors import (
    DEFAULT_PRIOR_WEIGHT,
    BlendSelector,
    NamedSelector,
    PredictorSelector,
    PromptSelector,
    RandomSelector,
    Selector,
    StaticSelector,
)
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.units.modules import family_of, unit_shape


@dataclasses.dataclass(frozen=True)
class SelectorFiles:
    """What selectors can be made from, beside the model.

    Attributes:
        adapter: the adapter at hand, if any.
        calibration: the calibration at hand, if any.
    """

    adapter: Adapter | None = None
    calibration: Calibration | None = None

    @property
    def predictor_fingerprint(self) -> str | None:
        """Of the adapter, if it holds a predictor."""
        if self.adapter is None or not self.adapter.has_predictor:
            return None
        return self.adapter.fingerprint


Make = Callable[[SelectorSpec, nn.Module, SelectorFiles], Selector]


@dataclasses.dataclass(frozen=True)
class SelectorKind:
    """One row of the registry.

    Attributes:
        needs: the file without which there is no such selector.
        reads: whether its choice depends on the instruction.
        version: changes whenever the same input may give other scores; goes into cache keys.
        takes_argument: whether something may follow its name.
        make: returns the selector for a spec, the dense model that reads, and the files.
        window: of a longer instruction it reads so many tokens; None for all.
    """

    needs: Literal["adapter", "calibration"] | None
    reads: bool
    version: str
    make: Make
    takes_argument: bool = False
    window: int | None = None

    def tokens_read(self, num_tokens: int) -> int:
        """Return how many tokens of an instruction the dense model reads."""
        if not self.reads:
            return 0
        return num_tokens if self.window is None else min(num_tokens, self.window)


def _predictor(spec: SelectorSpec, reader: nn.Module, files: SelectorFiles) -> Selector:
    assert files.adapter is not None
    return PredictorSelector(files.adapter.predictor(reader))


def _blend(spec: SelectorSpec, reader: nn.Module, files: SelectorFiles) -> Selector:
    assert files.calibration is not None
    weight = DEFAULT_PRIOR_WEIGHT
    if spec.argument is not None:
        weight = _number(spec, "the prior's share must be from 0 to 1")
        if not 0.0 <= weight <= 1.0:
            raise UsageError(f"{str(spec)!r}: the prior's share must be from 0 to 1")
    return BlendSelector(reader, files.calibration, weight)


def _static(spec: SelectorSpec, reader: nn.Module, files: SelectorFiles) -> Selector:
    assert files.calibration is not None
    selector = StaticSelector(files.calibration, spec.argument)
    selector.scores([()])  # an unknown task is refused now, not at the first prompt
    return selector


def _prompt(spec: SelectorSpec, reader: nn.Module, files: SelectorFiles) -> Selector:
    kind = family_of(reader).kind
    if spec.argument is not None and kind.name != "expert":
        raise UsageError(f"{str(spec)!r}: {kind.label} have one criterion; leave out ':'")
    if spec.argument is not None and spec.argument not in CRITERIA:
        raise UsageError(f"{str(spec)!r}: the criteria are {', '.join(CRITERIA)}")
    return PromptSelector(reader, spec.argument)


def _random(spec: SelectorSpec, reader: nn.Module, files: SelectorFiles) -> Selector:
    seed = 0 if spec.argument is None else _number(spec, "the seed must be a whole number")
    return RandomSelector(unit_shape(reader), seed=int(seed))


SELECTORS: dict[str, SelectorKind] = {
    "predictor": SelectorKind("adapter", True, "1", _predictor, window=HEAD_TOKENS + TAIL_TOKENS),
    "blend": SelectorKind("calibration", True, f"1-{DEFAULT_PRIOR_WEIGHT:g}", _blend, True),
    "static": SelectorKind("calibration", False, "1", _static, True),
    "prompt": SelectorKind(None, True, "1", _prompt, True),
    "random": SelectorKind(None, False, "1-0", _random, True),
}
"""Best first: without a choice of the user's, the first that the model has the files for."""

_HOW_TO_GET = {
    "adapter": "an IFP adapter with a predictor (`adapter`)",
    "calibration": "a calibration (ifp calibrate)",
}


def choose_selector(wanted: SelectorSpec | None, files: SelectorFiles) -> SelectorSpec:
    """Return the selector to use.

    Args:
        wanted: what the user asks for; None takes the best there is.
        files: what is at hand.

    Raises:
        UsageError: no such selector, or it needs a file that is not at hand.
    """
    has = {
        "adapter": files.predictor_fingerprint is not None,
        "calibration": files.calibration is not None,
        None: True,
    }
    if wanted is None:
        return SelectorSpec(next(name for name, kind in SELECTORS.items() if has[kind.needs]))
    kind = SELECTORS.get(wanted.name)
    if kind is None:
        raise UsageError(f"no selector {str(wanted)!r}; there are: {', '.join(SELECTORS)}")
    if wanted.argument is not None and not kind.takes_argument:
        raise UsageError(f"selector {wanted.name!r} takes no argument; leave out ':'")
    if not has[kind.needs]:
        assert kind.needs is not None
        raise UsageError(f"selector {str(wanted)!r} needs {_HOW_TO_GET[kind.needs]} for this model")
    return wanted


def selector_version(spec: SelectorSpec, files: SelectorFiles) -> str:
    """Return the version of a chosen selector, without making it."""
    kind = SELECTORS[spec.name]
    if kind.needs == "adapter":
        return files.predictor_fingerprint or kind.version
    return kind.version


def make_selector(spec: SelectorSpec, reader: nn.Module, files: SelectorFiles) -> NamedSelector:
    """Return the selector that ``choose_selector`` chose.

    Args:
        spec: what it returned.
        reader: the dense base model, which reads instructions.
        files: as given to ``choose_selector``.

    Raises:
        AdapterError: the adapter was made for another model.
        SelectionError: no such task was calibrated.
        UsageError: the argument does not fit.
    """
    selector = SELECTORS[spec.name].make(spec, reader, files)
    return NamedSelector.of_model(selector, spec, reader)


def _number(spec: SelectorSpec, advice: str) -> float:
    try:
        return float(spec.argument or "")
    except ValueError:
        raise UsageError(f"{str(spec)!r}: {advice}") from None

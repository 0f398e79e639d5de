"""Which selector a model gets: the one asked for, or the best that its files allow."""

import mlx.nn as nn

from ifp_mlx.adapters.adapter import Adapter
from ifp_mlx.errors import UsageError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.selection import (
    DEFAULT_PRIOR_WEIGHT,
    BlendSelector,
    PredictorSelector,
    PromptSelector,
    RandomSelector,
    Selector,
    StaticSelector,
)
from ifp_mlx.units import ffn

SELECTOR_NAMES = ("predictor", "blend", "static", "prompt", "random")
"""Best first: without a choice of the user's, the first that the model has the files for."""

READING_SELECTORS = frozenset({"predictor", "blend", "prompt"})
"""Those whose choice depends on the instruction."""


def choose_selector(
    wanted: str | None, adapter: Adapter | None, calibration: Calibration | None
) -> str:
    """Return the name of the selector to use.

    Args:
        wanted: one of ``SELECTOR_NAMES`` or ``static:TASK``; None takes the best there is.
        adapter: the adapter at hand, if any.
        calibration: the calibration at hand, if any.

    Raises:
        UsageError: no such selector, or it needs a file that is not at hand.
    """
    can_predict = adapter is not None and adapter.has_predictor
    missing = {
        "predictor": not can_predict and "an IFP adapter with a predictor (--adapter DIR)",
        "blend": calibration is None and "a calibration (ifp calibrate)",
        "static": calibration is None and "a calibration (ifp calibrate)",
    }
    if wanted is None:
        return next(name for name in SELECTOR_NAMES if not missing.get(name))
    kind = wanted.partition(":")[0]
    if kind not in SELECTOR_NAMES:
        raise UsageError(f"no selector {wanted!r}; there are: {', '.join(SELECTOR_NAMES)}")
    if missing.get(kind):
        raise UsageError(f"selector {wanted!r} needs {missing[kind]} for this model")
    return wanted


def selector_version(name: str, adapter: Adapter | None) -> str:
    """Return the version of the selector that ``choose_selector`` named, without making it."""
    kind = name.partition(":")[0]
    if kind == "predictor" and adapter is not None:
        return adapter.fingerprint
    # As the classes in selection.py say them; a test compares.
    versions = {"blend": f"1-{DEFAULT_PRIOR_WEIGHT:g}", "random": "1-0"}
    return versions.get(kind, "1")


def make_selector(
    name: str, reader: nn.Module, adapter: Adapter | None, calibration: Calibration | None
) -> Selector:
    """Return the selector that ``choose_selector`` named.

    Args:
        name: what it returned.
        reader: the dense base model, which reads instructions.
        adapter: as given to ``choose_selector``.
        calibration: as given to ``choose_selector``.

    Raises:
        AdapterError: the adapter was made for another model.
        SelectionError: no such task was calibrated.
    """
    kind, _, argument = name.partition(":")
    if kind == "predictor" and adapter is not None:
        return PredictorSelector(adapter.predictor(reader))
    if kind == "static" and calibration is not None:
        selector = StaticSelector(calibration, argument or None)
        selector.scores([])  # an unknown task is refused now, not at the first prompt
        return selector
    if kind == "blend" and calibration is not None:
        return BlendSelector(reader, calibration)
    if kind == "random":
        return RandomSelector(len(ffn.ffn_modules(reader)), ffn.num_units(reader))
    return PromptSelector(reader)

"""What one row of a quality table measures: which units, how many, chosen from what.

A row is written ``SELECTOR[:ARGUMENT][+CHANGE]...[@KEEP]``: ``blend@0.5``,
``static:math+adapted@768``, ``predictor+task@512``, ``dense``.
"""

import dataclasses
import re

from ifp_mlx.errors import UsageError
from ifp_mlx.subnets.selectors import SELECTORS as MODEL_SELECTORS
from ifp_mlx.units.amounts import Amounts

SELECTORS: dict[str, str] = {
    "dense": "all units",
    "predictor": "an adapter's trained predictor reads the prompt",
    "blend": "ranks by prompt and by prior, mixed; blend:0.5 sets the share of the prior",
    "prompt": "the prompt's activations alone",
    "static": "the calibrated prior; static:TASK that of one calibrated task",
    "domain": "the calibrated prior of each text's own domain, where there is one",
    "random": "random units; random:SEED draws others",
}

CHANGES: dict[str, str] = {
    "task": "the domain's task description selects, once for all its texts",
    "fixed": "control: the mean of all texts' masks, for every text",
    "shuffled": "control: each text gets the mask of a text of another domain",
    "adapted": "cut from the adapter's weights; always so for predictor rows",
}

_ROW = re.compile(
    r"(?P<selector>[a-z]+)(?::(?P<argument>[^+@]+))?(?P<changes>(?:\+[a-z]+)*)(?:@(?P<keep>[\d.]+))?"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a quality table.

    Attributes:
        selector: a key of ``SELECTORS``.
        num_kept_units: K; F for ``dense``.
        argument: the task of ``static``, the prior's share of ``blend``, the seed of ``random``.
        per_task: the domain's description selects instead of each prompt.
        control: ``fixed`` or ``shuffled``, or None.
        adapted: the units are those of the adapter's weights.
    """

    selector: str
    num_kept_units: int
    argument: str | None = None
    per_task: bool = False
    control: str | None = None
    adapted: bool = False

    @property
    def label(self) -> str:
        """The row as it can be written again, K in units."""
        amount = "" if self.selector == "dense" else f"@{self.num_kept_units}"
        return self.name + amount

    @property
    def name(self) -> str:
        """The row without its K."""
        changes = [
            *(["task"] if self.per_task else []),
            *([self.control] if self.control else []),
            *(["adapted"] if self.adapted and self.selector != "predictor" else []),
        ]
        argument = f":{self.argument}" if self.argument else ""
        return self.selector + argument + "".join(f"+{change}" for change in changes)

    @property
    def reads_input(self) -> bool:
        """Whether each text, or its task's description, selects."""
        return _reads(self.selector)


def parse_row(text: str, amounts: Amounts, default_num_kept_units: int) -> Row:
    """Return the row that a text describes.

    Args:
        text: see the module's docstring. KEEP is a share up to 1, or a number of units above it.
        amounts: of units that can be kept.
        default_num_kept_units: K where the text does not say.

    Raises:
        UsageError: it is no row, or says things that exclude each other.
    """
    match = _ROW.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is no row; write SELECTOR[:ARGUMENT][+CHANGE][@KEEP]: blend@0.5"
        )
    selector, argument = match["selector"], match["argument"]
    if selector not in SELECTORS:
        raise UsageError(f"row {text!r}: no selector {selector!r}; there are {_names(SELECTORS)}")
    changes = match["changes"].split("+")[1:]
    for change in changes:
        if change not in CHANGES:
            raise UsageError(f"row {text!r}: no change {change!r}; there are {_names(CHANGES)}")
    _check_argument(text, selector, argument)
    controls = [change for change in ("fixed", "shuffled") if change in changes]
    if len(controls) > 1:
        raise UsageError(f"row {text!r}: fixed and shuffled exclude each other")
    if selector == "dense" and (match["keep"] or set(changes) - {"adapted"}):
        raise UsageError(f"row {text!r}: dense keeps every unit; only +adapted goes with it")
    if "task" in changes and not _reads(selector):
        raise UsageError(f"row {text!r}: {selector} does not read its input; leave out +task")
    return Row(
        selector=selector,
        num_kept_units=(
            amounts.num_units
            if selector == "dense"
            else _num_kept_units(match["keep"], amounts, default_num_kept_units)
        ),
        argument=argument,
        per_task="task" in changes,
        control=controls[0] if controls else None,
        adapted="adapted" in changes or selector == "predictor",
    )


def _check_argument(text: str, selector: str, argument: str | None) -> None:
    if argument is None:
        return
    if selector not in ("static", "blend", "random", "prompt"):
        raise UsageError(f"row {text!r}: {selector} takes no argument")
    if selector == "random" and not argument.isdigit():
        raise UsageError(f"row {text!r}: the seed must be a whole number")
    if selector == "blend":
        try:
            share = float(argument)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            raise UsageError(f"row {text!r}: the prior's share must be from 0 to 1")


def _reads(selector: str) -> bool:
    return selector in MODEL_SELECTORS and MODEL_SELECTORS[selector].reads


def _num_kept_units(keep: str | None, amounts: Amounts, default: int) -> int:
    if keep is None:
        return default
    try:
        amount = float(keep)
    except ValueError:
        raise UsageError(f"@{keep} is no amount of units; write @0.5 or @768") from None
    if amount <= 1.0:
        return amounts.nearest(amount)
    if amount != int(amount):
        raise UsageError(f"@{keep} is no amount of units; write @0.5 or @768")
    return amounts.check(int(amount))


def _names(known: dict[str, str]) -> str:
    return ", ".join(known)

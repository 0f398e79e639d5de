"""The picture of a sub-network: layers by units, coloured by score or by what another shares."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ifp_mlx.pictures.drawing import FONT_PX, LINE_PX, Drawing, fitting, text_width
from ifp_mlx.pictures.unit_map import Shares, UnitMap, binned

DEFAULT_WIDTH = 760
WIDTHS = (280, 1600)
"""The narrowest and the widest picture, in pixels."""

_COLUMNS = 256
_LABELS = {"ffn": "FFN units", "expert": "experts"}
_MARGIN, _LEFT, _GAP = 12, 34, 14
_PROFILE_SHARE = 0.16  # of the width, for the overlap by layer
_ROW_PX = (4.0, 16.0)
_HEIGHT_PX = 330.0

# Class name -> colours on light and on dark ground. Sequential blue for scores; grey for what two
# have in common, blue and orange for what one has alone, which all common forms of colour blindness
# tell apart.
_SCORES = {
    "s1": ("#dbe7f5", "#16263a"), "s2": ("#b5d0ec", "#1d3c5f"), "s3": ("#86b3e0", "#265587"),
    "s4": ("#5592d0", "#3573b1"), "s5": ("#2f70b5", "#5a9bd8"), "s6": ("#17508f", "#9cc9f2"),
}  # fmt: skip
_BOTH = {"both": ("#c9ced4", "#48525d")}
_HERE = {
    "h1": ("#b3c7df", "#435e80"), "h2": ("#8fb4de", "#3f6795"), "h3": ("#689fda", "#3f78b5"),
    "h4": ("#3b86cf", "#4a90d9"), "h5": ("#0b5cad", "#85bdf5"),
}  # fmt: skip
_THERE = {
    "t1": ("#fbe0c2", "#3a2a1a"), "t2": ("#f8c58f", "#5e3f1f"), "t3": ("#f2a552", "#8f5a20"),
    "t4": ("#df7f1e", "#d07f2c"), "t5": ("#b85c00", "#ffb35c"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A sub-network to draw.

    Attributes:
        name: what it is for.
        units: what it keeps.
        measure: what higher scores mean, for the legend.
    """

    name: str
    units: UnitMap
    measure: str = "higher score"


def describe(one: Subject, other: Subject | None = None) -> str:
    """Return in words what ``draw`` shows.

    Raises:
        SelectionError: the two are of models of different shape.
    """
    units = one.units
    text = (
        f"{one.name}: {units.num_kept_units} of {units.num_units} {_label(units)} in each of "
        f"{len(units.layers)} layers"
    )
    if other is None:
        return text
    shares = _shares(units, other.units)
    least, most = int(shares.argmin()), int(shares.argmax())
    return (
        f"{text}. {shares.mean():.0%} of them are also kept for {other.name}, least in layer "
        f"{units.layers[least] + 1} ({shares[least]:.0%}), most in layer "
        f"{units.layers[most] + 1} ({shares[most]:.0%}); of random ones {other.units.chance:.0%} "
        "would be"
    )


def draw(one: Subject, other: Subject | None = None, *, width: int = DEFAULT_WIDTH) -> str:
    """Return a sub-network's picture as SVG.

    A row is a layer, a column some units of it. Alone, the units are in the model's order, and the
    darker the more of them are kept and the higher their scores, where those are known. Against
    another one they are in the order of the first one's scores, what it keeps first; colour is what
    one of the two keeps alone.

    Args:
        one: the sub-network.
        other: another one of the same model.
        width: in pixels.

    Raises:
        SelectionError: the two are of models of different shape.
    """
    units = one.units
    title = one.name if other is None else f"{one.name} | {other.name}"
    colours = _SCORES | _BOTH | _HERE | _THERE
    drawing = Drawing(width, title, describe(one, other), colours)
    text_px = width - 2 * _MARGIN
    y = _MARGIN + LINE_PX / 2
    drawing.text(_MARGIN, y, fitting(one.name, text_px))
    for line in _subtitles(one, other, text_px):
        y += LINE_PX
        drawing.text(_MARGIN, y, fitting(line, text_px), css="quiet")
    y += LINE_PX
    num_layers = len(units.layers)
    height = num_layers * float(np.clip(_HEIGHT_PX / num_layers, *_ROW_PX))
    map_px = float(width - _MARGIN - _LEFT)
    if other is not None:
        profile_px = width * _PROFILE_SHARE
        map_px -= profile_px + _GAP
        _draw_profile(drawing, units, other.units, _LEFT + map_px + _GAP, y, profile_px, height)
    drawing.rectangle(_LEFT, y, map_px, height, "frame")
    _label_layers(drawing, units, y, height)
    if other is None:
        drawing.cells(_LEFT, y, map_px, height, _by_score(units))
        order = "in the order of the model"
    else:
        _draw_compared(drawing, units, other.units, _LEFT, y, map_px, height)
        order = "kept ones first" if units.scores is None else "by score, kept ones first"
    drawing.text(_LEFT, y + height + LINE_PX / 2, fitting(order, map_px), css="quiet")
    y = _draw_legend(drawing, one, other, y + height + 2 * LINE_PX)
    return drawing.svg(y + _MARGIN)


def _label(units: UnitMap) -> str:
    return _LABELS.get(units.kind, "units")


def _shares(one: UnitMap, other: UnitMap) -> Shares:
    """Return the (L,) shares of one's units that the other keeps as well."""
    shares: Shares = one.shared(other) / one.num_kept_units
    return shares


def _subtitles(one: Subject, other: Subject | None, width: float) -> list[str]:
    units = one.units
    amount = f"{units.num_kept_units} of {units.num_units} {_label(units)} a layer"
    if other is None:
        return [amount]
    lines = [f"{amount}, {_shares(units, other.units).mean():.0%} shared with", other.name]
    together = " ".join(lines)
    return [together] if text_width(together) <= width else lines


def _by_score(units: UnitMap) -> npt.NDArray[np.str_]:
    """Return (L, C) classes for the units in their own order."""
    values = units.kept * (1.0 if units.scores is None else 0.1 + 0.9 * units.scores)
    shades = binned(values, _COLUMNS)
    # Means of several units lie close together: the colours are for the range that there is.
    low, high = np.quantile(shades, (0.02, 0.98))
    stretched = np.clip((shades - low) / max(high - low, 1e-9), 1e-3, 1)
    return _shaded(np.where(shades > 0, stretched, 0), "", _SCORES)


def _shaded(
    shares: Shares, without: str, colours: dict[str, tuple[str, str]]
) -> npt.NDArray[np.str_]:
    """Return a class for each share from 0 to 1: ``without`` for 0, then the colours in turn."""
    levels = np.ceil(shares * len(colours) - 1e-9).astype(int)
    classes: npt.NDArray[np.str_] = np.array([without, *colours])[levels]
    return classes


def _draw_compared(
    drawing: Drawing, one: UnitMap, other: UnitMap, x: float, y: float, width: float, height: float
) -> None:
    """Draw the units in the order of the first one's scores: what it keeps, a line, the others."""
    kept_there = other.kept.astype(int)
    scores = kept_there if one.scores is None else one.scores
    order = np.lexsort((-scores, ~one.kept))  # along the last axis, layer by layer
    kept_there = np.take_along_axis(kept_there, order, axis=1)
    num_kept, columns = one.num_kept_units, min(_COLUMNS, one.num_units)
    border = width * one.chance
    here = 1 - binned(kept_there[:, :num_kept], max(1, round(columns * one.chance)))
    drawing.cells(x, y, border, height, _shaded(here, "both", _HERE))
    if num_kept < one.num_units:
        there = binned(kept_there[:, num_kept:], max(1, round(columns * (1 - one.chance))))
        drawing.cells(x + border, y, width - border, height, _shaded(there, "", _THERE))
    drawing.upright(x + border, y - 3, height + 6)


def _label_layers(drawing: Drawing, units: UnitMap, y: float, height: float) -> None:
    row_px = height / len(units.layers)
    stride = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * row_px >= FONT_PX + 1)
    for position, layer in enumerate(units.layers):
        is_free = position == 0 or position * row_px > FONT_PX
        if is_free and (position == 0 or (layer + 1) % stride == 0):
            middle = y + (position + 0.5) * row_px
            drawing.text(_LEFT - 6, middle, str(layer + 1), anchor="end", css="quiet")


def _draw_profile(
    drawing: Drawing, one: UnitMap, other: UnitMap, x: float, y: float, width: float, height: float
) -> None:
    """Draw the share of units in common by layer, from 0 to 1, and where chance is."""
    shares = _shares(one, other)
    row_px = height / len(shares)
    drawing.rectangle(x, y, width, height, "frame")
    for row, share in enumerate(shares.tolist()):
        drawing.rectangle(x, y + (row + 0.1) * row_px, share * width, row_px * 0.8, "both")
    drawing.upright(x + other.chance * width, y - 3, height + 6)
    drawing.text(x, y + height + LINE_PX / 2, fitting("shared", width), css="quiet")


def _draw_legend(drawing: Drawing, one: Subject, other: Subject | None, y: float) -> float:
    """Draw what the colours mean from ``y`` down; return where it ends."""
    items: list[tuple[Sequence[str], str]]
    if other is None:
        meaning = "more of them kept" if one.units.scores is None else f"kept, {one.measure}"
        items = [(["frame"], "left out"), (list(_SCORES), meaning)]
    else:
        items = [
            (["both"], "both"),
            (list(_HERE), "this one alone: few to all"),
            (list(_THERE), "the other one alone"),
            (["frame"], "neither"),
        ]
    x = float(_LEFT)
    for classes, text in items:
        needed = len(classes) * FONT_PX + 6 + text_width(text)
        if x > _LEFT and x + needed > drawing.width - _MARGIN:
            x, y = float(_LEFT), y + LINE_PX
        for name in classes:
            drawing.rectangle(x, y - FONT_PX / 2, FONT_PX, FONT_PX, name)
            x += FONT_PX
        drawing.text(x + 6, y, text, css="quiet")
        x += 6 + text_width(text) + _GAP
    if other is not None:
        text = "shared if random"
        if x + 10 + text_width(text) > drawing.width - _MARGIN:
            x, y = float(_LEFT), y + LINE_PX
        drawing.upright(x + 2, y - FONT_PX / 2, FONT_PX)
        drawing.text(x + 10, y, text, css="quiet")
    return y + LINE_PX / 2

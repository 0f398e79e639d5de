"""The few SVG shapes that pictures are made of, and the colours that suit light and dark pages."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

FONT_PX = 12
LINE_PX = 18
_CHARACTER_PX = 6.6  # of this font on average, a little generously

_STYLE = (
    f"text{{font:{FONT_PX}px system-ui,sans-serif;fill:#1b1f24}}"
    ".quiet{fill:#57606a}.ground{fill:#fff}.frame{fill:#f1f3f5}.line{stroke:#57606a}"
    "path{fill:none;stroke-width:1}"
)
_DARK_STYLE = (
    "text{fill:#e6edf3}.quiet{fill:#9da7b1}.ground{fill:#0f1317}.frame{fill:#1a2027}"
    ".line{stroke:#c9d1d9}"
)


class Drawing:
    """An SVG picture in the making.

    Args:
        width: in pixels.
        title: what it shows, in a few words.
        description: the same for somebody who cannot see it.
        colours: class name -> its colour on a light and on a dark page.
    """

    def __init__(
        self, width: int, title: str, description: str, colours: Mapping[str, tuple[str, str]]
    ):
        self.width = width
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "role": "img",
                "aria-labelledby": "title description",
            },
        )
        self._add("title", {"id": "title"}, title)
        self._add("desc", {"id": "description"}, description)
        light, dark = (
            "".join(
                f".{name}{{stroke:{pair[i]}}}rect.{name}{{fill:{pair[i]};stroke:none}}"
                for name, pair in colours.items()
            )
            for i in (0, 1)
        )
        scheme = f"@media (prefers-color-scheme:dark){{{_DARK_STYLE}{dark}}}"
        self._add("style", {}, _STYLE + light + scheme)
        self._ground = self._add("rect", {"class": "ground", "width": "100%", "height": "100%"})

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", css: str = "") -> None:
        """Write a line whose middle is at ``y``."""
        place = {"x": f"{x:g}", "y": f"{y + FONT_PX * 0.35:g}", "text-anchor": anchor}
        self._add("text", place | ({"class": css} if css else {}), text)

    def rectangle(self, x: float, y: float, width: float, height: float, css: str) -> None:
        """Fill a rectangle."""
        size = {"x": x, "y": y, "width": width, "height": height}
        self._add("rect", {"class": css} | {name: f"{value:g}" for name, value in size.items()})

    def upright(self, x: float, y: float, height: float) -> None:
        """Draw a thin vertical line."""
        ends = {"x1": x, "x2": x, "y1": y, "y2": y + height}
        self._add("line", {"class": "line"} | {name: f"{value:g}" for name, value in ends.items()})

    def cells(
        self, x: float, y: float, width: float, height: float, classes: npt.NDArray[np.str_]
    ) -> None:
        """Fill a grid.

        Args:
            x: of its upper left corner.
            y: the same.
            width: of the grid.
            height: of the grid.
            classes: (L, C) class names; cells without one stay empty.
        """
        rows, columns = classes.shape
        scale = f"translate({x:g} {y:g}) scale({width / columns:.5g} {height / rows:.5g})"
        group = ElementTree.SubElement(
            self._root, "g", {"transform": scale, "shape-rendering": "crispEdges"}
        )
        for name in filter(None, np.unique(classes).tolist()):
            steps = [
                f"M{first} {row}.5h{last - first}"
                for row in range(rows)
                for first, last in _runs(classes[row] == name)
            ]
            ElementTree.SubElement(group, "path", {"class": name, "d": "".join(steps)})

    def svg(self, height: float) -> str:
        """Return the picture, this many pixels high."""
        size = {"width": f"{self.width}", "height": f"{height:g}"}
        for name, value in {**size, "viewBox": f"0 0 {self.width} {height:g}"}.items():
            self._root.set(name, value)
        return ElementTree.tostring(self._root, encoding="unicode")

    def _add(
        self, tag: str, attributes: dict[str, str], text: str | None = None
    ) -> ElementTree.Element:
        element = ElementTree.SubElement(self._root, tag, attributes)
        element.text = None if text is None else printable(text)
        return element


def printable(text: str) -> str:
    """Return text as one line without what XML cannot hold."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def fitting(text: str, width_px: float) -> str:
    """Return as much of a text as a line of this width takes."""
    text = printable(text)
    most = max(1, int(width_px / _CHARACTER_PX))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def text_width(text: str) -> float:
    """Return about how wide a text is, in pixels."""
    return len(text) * _CHARACTER_PX


def _runs(row: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield where the stretches of true values begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)

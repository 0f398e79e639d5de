"""Unit maps, and the pictures that are drawn of them."""

import re
import xml.etree.ElementTree as ElementTree

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from ifp_mlx.errors import SelectionError
from ifp_mlx.pictures.subnetwork import Subject, describe, draw
from ifp_mlx.pictures.unit_map import UnitMap, binned
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.spec import SelectorSpec

SVG = "{http://www.w3.org/2000/svg}"
NAMES = (
    "<img src=x onerror=alert(1)>",
    "</svg><script>alert(1)</script>",
    "]]>&amp;\x00\x1b[31m\ud800\u202e",
    "\"quoted\" 'too'\n\n" + "long " * 100,
)


def units(kept: list[list[int]], num_units: int = 8, scores: bool = True) -> UnitMap:
    ranks = mx.tile(mx.arange(num_units)[::-1] * 16, (len(kept), 1)).astype(mx.uint8)
    indices = mx.array(kept, dtype=mx.int32)
    pick = Pick("ffn", tuple(range(len(kept))), indices, num_units, ranks if scores else None)
    return UnitMap.of(Selection((pick,), SelectorSpec("test")))


def cells(svg: str) -> list[npt.NDArray[np.str_]]:
    """Return each grid of a picture as the class names of its cells."""
    grids = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        found = {}
        for path in group.iter(f"{SVG}path"):
            for x, y, length in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.attrib["d"]):
                for column in range(int(x), int(x) + int(length)):
                    assert (int(y), column) not in found
                    found[int(y), column] = path.attrib["class"]
        grid = np.full((1 + max(y for y, _ in found), 1 + max(x for _, x in found)), "", "<U8")
        for place, name in found.items():
            grid[place] = name
        grids.append(grid)
    return grids


def test_a_map_holds_what_the_selection_keeps() -> None:
    one = units([[0, 3], [5, 7]])
    assert np.argwhere(one.kept).tolist() == [[0, 0], [0, 3], [1, 5], [1, 7]]
    assert (one.num_kept_units, one.num_units, one.chance) == (2, 8, 0.25)
    assert one.scores is not None
    assert one.scores[0, 0] > one.scores[0, 7] == 0


def test_what_two_maps_share_is_counted_by_layer() -> None:
    one, other = units([[0, 3], [5, 7]]), units([[0, 3, 4], [1, 2, 5]])
    assert one.shared(other).tolist() == [2, 1]
    assert one.overlap(other) == other.overlap(one) == 0.75
    with pytest.raises(SelectionError, match="one shape"):
        one.shared(units([[0, 3]]))


def test_columns_are_means_of_neighbours() -> None:
    values = np.array([[0, 1, 1, 1, 0, 0, 0, 1]])
    assert binned(values, 4).tolist() == [[0.5, 1, 0, 0.5]]
    assert binned(values, 100).tolist() == values.tolist()
    assert binned(values, 3).mean() == pytest.approx(0.5, abs=0.2)


def test_alone_what_is_left_out_is_empty_and_higher_scores_are_darker() -> None:
    (grid,) = cells(draw(Subject("a", units([[0, 1, 2, 3], [0, 2, 4, 6]]))))
    assert grid[0, 0] == "s6"
    assert "" not in grid[0, :4].tolist()
    assert grid[1].tolist()[1::2] == [""] * (grid.shape[1] // 2)
    assert grid[0].tolist()[4:] == [""] * (grid.shape[1] - 4)
    (unscored,) = cells(draw(Subject("a", units([[0, 1, 2, 3]], scores=False))))
    assert len(set(unscored[0].tolist())) == 1


@pytest.mark.parametrize("scores", [True, False])
def test_compared_the_first_ones_units_come_first_and_differences_have_colours(
    scores: bool,
) -> None:
    one, other = units([[0, 1, 2, 3]], scores=scores), units([[0, 2, 6, 7]], scores=scores)
    kept, left_out = cells(draw(Subject("a", one), Subject("b", other)))
    if scores:  # 0, 1, 2, 3 in this order
        assert kept.tolist() == [["both", "h5", "both", "h5"]]
        assert left_out.tolist() == [["", "", "t5", "t5"]]
    else:
        assert kept.tolist() == [["both", "both", "h5", "h5"]]
        assert left_out.tolist() == [["t5", "t5"]]


def test_the_whole_model_is_compared_with_a_part_of_it() -> None:
    whole = units([[0, 1, 2, 3, 4, 5, 6, 7]])
    (grid,) = cells(draw(Subject("a", whole), Subject("b", units([[0, 1]]))))
    assert grid.tolist() == [["both"] * 2 + ["h5"] * 6]
    assert "100% of them" in describe(Subject("b", units([[0, 1]])), Subject("a", whole))


def test_large_models_make_small_pictures() -> None:
    generator = np.random.default_rng(0)
    masks = generator.random((2, 64, 25_000)).argsort(axis=-1) < 12_500
    one, other = (UnitMap("ffn", tuple(range(64)), mask) for mask in masks)
    for svg in (draw(Subject("a", one)), draw(Subject("a", one), Subject("b", other))):
        assert len(svg) < 200_000


def test_the_text_says_what_the_picture_shows() -> None:
    one, other = units([[0, 3], [5, 7]]), units([[0, 3, 4], [1, 2, 5]])
    assert describe(Subject("a", one)) == "a: 2 of 8 FFN units in each of 2 layers"
    text = describe(Subject("a", one), Subject("b", other))
    assert "75% of them are also kept for b, least in layer 2 (50%)" in text
    assert "most in layer 1 (100%); of random ones 38% would be" in text
    root = ElementTree.fromstring(draw(Subject("a", one), Subject("b", other)))
    assert root.attrib["role"] == "img"
    assert root.findtext(f"{SVG}desc") == text


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_whatever_they_hold(name: str) -> None:
    one = units([[0, 3], [5, 7]])
    svg = draw(Subject(name, one), Subject(name, one))
    root = ElementTree.fromstring(svg.encode())  # it is well-formed, and can be written
    allowed = {"svg", "title", "desc", "style", "rect", "text", "g", "path", "line"}
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == allowed
    assert not any(key.startswith("on") for element in root.iter() for key in element.attrib)
    assert all(len(element.text or "") < 130 for element in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("width", [280, 760, 1600])
def test_nothing_is_outside_the_picture(width: int) -> None:
    one, other = units([[0, 3], [5, 7]]), units([[0, 3], [1, 2]])
    for svg in (
        draw(Subject("a", one), width=width),
        draw(Subject("a", one), Subject("b", other), width=width),
    ):
        root = ElementTree.fromstring(svg)
        assert root.attrib["width"] == str(width)
        for box in root.iter(f"{SVG}rect"):
            if not box.attrib["width"].endswith("%"):
                right = float(box.attrib["x"]) + float(box.attrib["width"])
                bottom = float(box.attrib["y"]) + float(box.attrib["height"])
                assert right <= width
                assert bottom <= float(root.attrib["height"])

"""Heat maps of overlaps, drawn with matplotlib (the ``plots`` extra)."""

from pathlib import Path

import numpy as np

from ifp_mlx.errors import UsageError
from ifp_mlx.evaluation.overlap import Figures, Overlap
from ifp_mlx.storage.files import atomic_path

_DOTS_PER_INCH = 120


def write_heat_maps(overlap: Overlap, folder: Path) -> list[Path]:
    """Write a PNG of the first, the middle and the last layer's overlaps; return their paths.

    The three share one colour scale, from chance to identical.

    Raises:
        UsageError: matplotlib is not installed.
        ResourceError: the folder cannot be written.
    """
    last = len(overlap.by_layer) - 1
    paths = []
    for name, layer in {"first": 0, "middle": last // 2, "last": last}.items():
        path = folder / f"overlap-{name}-layer.png"
        title = f"layer {layer + 1} of {last + 1}: share of kept units in common"
        _write(overlap.by_layer[layer], overlap, title, path)
        paths.append(path)
    return paths


def _write(matrix: Figures, overlap: Overlap, title: str, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("heat maps need matplotlib: pip install 'ifp-mlx[plots]'") from None
    names = overlap.domains
    side_inches = 3.0 + 0.42 * len(names)
    figure = Figure(figsize=(side_inches + 1.0, side_inches), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, vmin=overlap.chance, vmax=1.0, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for (row, column), value in np.ndenumerate(matrix):
        dark = value < (overlap.chance + 1.0) / 2
        colour = "white" if dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label=f"overlap (chance {overlap.chance:.2f})")
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})
    # The metadata would name the drawing program's version and change with it.

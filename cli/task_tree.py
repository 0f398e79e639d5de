"""``ifp cache list --tree``: which cached tasks are of a kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.terminal import answer_console, print_json, say, title
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from rich.tree import Tree

    from ifp_mlx.selection.selection import Selection
    from ifp_mlx.selection.task_tree import Overlaps, TaskGroup
    from ifp_mlx.subnets.task_cache import CacheEntry, CacheKey

DEFAULT_THRESHOLD = 0.9


@dataclasses.dataclass(frozen=True)
class _TaskTree:
    """Tasks that can be compared: of one model, adapter, selector and K; and how they join."""

    entries: list[CacheEntry]
    overlaps: Overlaps
    root: TaskGroup

    @property
    def heading(self) -> str:
        entry = self.entries[0]
        return (
            f"{entry.model_name}, {entry.key.selector}, "
            f"{entry.key.num_kept_units} of {entry.num_units} units"
        )

    def task(self, group: TaskGroup) -> str:
        """Return the description of a group of a single task."""
        (member,) = group.members
        return self.entries[member].key.task


Threshold = Annotated[
    float,
    typer.Option(
        "--threshold",
        metavar="OVERLAP",
        min=0.0,
        max=1.0,
        help="With --tree: tasks are of one family if their sub-networks have at least this share "
        "of their units in common.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--png", metavar="FILE", help="With --tree: also draw it, as a PNG (needs matplotlib)."
    ),
]


def tasks(
    threshold: Threshold = DEFAULT_THRESHOLD,
    png: Picture = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which cached tasks are of a kind.

    Grouped into families by what their sub-networks have in common.
    """
    if png is not None and png.suffix != ".png":
        raise UsageError(f"--png writes a .png file, not {png.name}")
    trees = _trees()
    if png is not None:
        _draw(trees, png)
    if as_json:
        print_json([_record(tree, threshold) for tree in trees])
        return
    if not trees:
        say('no cached tasks; ifp cache add "help me write Python" adds one')
    for tree in trees:
        answer_console().print(_rendered(tree, threshold))


def _trees() -> list[_TaskTree]:
    from ifp_mlx.errors import SelectionError
    from ifp_mlx.selection.task_tree import overlap_matrix, task_tree
    from ifp_mlx.storage.home import subnet_cache_folder
    from ifp_mlx.subnets.task_cache import TaskCache

    comparable: dict[CacheKey, list[tuple[CacheEntry, Selection]]] = {}
    for entry in TaskCache(subnet_cache_folder()).entries():
        try:
            found = entry, entry.load()
        except SelectionError as error:
            say(f"left out {entry.path.name}: {error}")
            continue
        comparable.setdefault(dataclasses.replace(entry.key, task=""), []).append(found)
    trees = []
    for members in comparable.values():
        members.sort(key=lambda member: member[0].key.task)
        overlaps = overlap_matrix([selection for _, selection in members])
        trees.append(_TaskTree([entry for entry, _ in members], overlaps, task_tree(overlaps)))
    return trees


def _rendered(tree: _TaskTree, threshold: float) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(tree.heading, style="bold"), guide_style="dim")
    for number, group in enumerate(tree.root.split(threshold), start=1):
        if not group.parts:
            root.add(Text(title(tree.task(group))))
            continue
        branch = root.add(Text(f"family {number}, overlap {group.overlap:.3f}", style="dim"))
        _add_parts(branch, group, tree)
    return root


def _add_parts(branch: Tree, group: TaskGroup, tree: _TaskTree) -> None:
    from rich.text import Text

    for part in group.parts:
        if part.parts:
            _add_parts(branch.add(Text(f"overlap {part.overlap:.3f}", style="dim")), part, tree)
        else:
            branch.add(Text(title(tree.task(part))))


def _record(tree: _TaskTree, threshold: float) -> dict[str, Any]:
    entry = tree.entries[0]
    return {
        "model": entry.model_name,
        "selector": entry.key.selector,
        "num_kept_units": entry.key.num_kept_units,
        "num_units": entry.num_units,
        "tasks": [entry.key.task for entry in tree.entries],
        "overlaps": tree.overlaps.tolist(),
        "families": [
            {
                "tasks": [tree.entries[member].key.task for member in group.members],
                "overlap": group.overlap,
            }
            for group in tree.root.split(threshold)
        ],
    }


def _draw(trees: list[_TaskTree], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--png needs matplotlib; pip install 'ifp-mlx[plots]'") from None
    if not trees:
        raise UsageError("no cached tasks to draw; ifp cache add adds one")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ifp_mlx.storage.files import atomic_path

    num_tasks = sum(len(tree.entries) for tree in trees)
    figure, every_axes = pyplot.subplots(
        len(trees), 1, figsize=(9, 1.2 * len(trees) + 0.35 * num_tasks), squeeze=False
    )
    for tree, axes in zip(trees, every_axes[:, 0], strict=True):
        labels: list[str] = []
        _draw_group(axes, tree.root, tree, labels)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(1.02, min(tree.overlaps.min(), 0.98) - 0.02)
        axes.set_xlabel("overlap of kept units, mean over layers")
        axes.set_title(tree.heading, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def _draw_group(axes: Any, group: TaskGroup, tree: _TaskTree, labels: list[str]) -> float:
    """Draw one group's branches and return the height at which its own branch begins."""
    if not group.parts:
        labels.append(title(tree.task(group)))
        return len(labels) - 1.0
    heights = [_draw_group(axes, part, tree, labels) for part in group.parts]
    for part, height in zip(group.parts, heights, strict=True):
        axes.plot([part.overlap, group.overlap], [height, height], color="0.3", linewidth=1.2)
    axes.plot([group.overlap] * 2, heights, color="0.3", linewidth=1.2)
    return sum(heights) / 2

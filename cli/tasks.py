"""``ifp tasks``: which cached tasks are of a kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.loading import title
from ifp_mlx.cli.terminal import answer_console, print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from rich.tree import Tree

    from ifp_mlx.selection.task_tree import Family, Overlaps
    from ifp_mlx.subnets.task_cache import CacheEntry


@dataclasses.dataclass(frozen=True)
class _Group:
    """Entries that can be compared: one model, adapter, selector and K; and their tree."""

    entries: list[CacheEntry]
    overlaps: Overlaps
    tree: Family

    @property
    def heading(self) -> str:
        entry = self.entries[0]
        return (
            f"{entry.model_name}, {entry.key.selector}, "
            f"{entry.key.num_kept_units} of {entry.num_units} units"
        )


def tasks(
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            metavar="OVERLAP",
            min=0.0,
            max=1.0,
            help="Tasks are of one family if their sub-networks overlap by at least this much.",
        ),
    ] = 0.9,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Also draw the trees (needs matplotlib)."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which cached tasks are of a kind.

    Grouped into families by what their sub-networks have in common.
    """
    if png is not None and png.suffix != ".png":
        raise UsageError(f"--png writes a .png file, not {png.name}")
    groups = _groups()
    if png is not None:
        _draw(groups, png)
    if as_json:
        print_json([_record(group, threshold) for group in groups])
        return
    if not groups:
        say('no cached tasks; ifp cache add "help me write Python" adds one')
    for group in groups:
        answer_console().print(_rendered(group, threshold))


def _groups() -> list[_Group]:
    from ifp_mlx.selection.task_tree import family_tree, overlap_matrix
    from ifp_mlx.storage.home import subnet_cache_folder
    from ifp_mlx.subnets.task_cache import SubNetCache

    comparable: dict[Any, list[CacheEntry]] = {}
    for entry in SubNetCache(subnet_cache_folder()).entries():
        comparable.setdefault(dataclasses.replace(entry.key, task=""), []).append(entry)
    groups = []
    for entries in comparable.values():
        entries.sort(key=lambda entry: entry.key.task)
        overlaps = overlap_matrix([entry.load() for entry in entries])
        groups.append(_Group(entries, overlaps, family_tree(overlaps)))
    return groups


def _rendered(group: _Group, threshold: float) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(group.heading, style="bold"), guide_style="dim")
    for number, family in enumerate(group.tree.split(threshold), start=1):
        if not family.parts:
            root.add(Text(title(group.entries[family.members[0]].key.task)))
            continue
        branch = root.add(Text(f"family {number}, overlap {family.overlap:.3f}", style="dim"))
        _add_parts(branch, family, group)
    return root


def _add_parts(branch: Tree, family: Family, group: _Group) -> None:
    from rich.text import Text

    for part in family.parts:
        if part.parts:
            _add_parts(branch.add(Text(f"overlap {part.overlap:.3f}", style="dim")), part, group)
        else:
            branch.add(Text(title(group.entries[part.members[0]].key.task)))


def _record(group: _Group, threshold: float) -> dict[str, Any]:
    entry = group.entries[0]
    return {
        "model": entry.model_name,
        "selector": entry.key.selector,
        "num_kept_units": entry.key.num_kept_units,
        "num_units": entry.num_units,
        "tasks": [entry.key.task for entry in group.entries],
        "overlaps": group.overlaps.tolist(),
        "families": [
            {
                "tasks": [group.entries[member].key.task for member in family.members],
                "overlap": family.overlap,
            }
            for family in group.tree.split(threshold)
        ],
    }


def _draw(groups: list[_Group], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--png needs matplotlib; pip install 'ifp-mlx[plots]'") from None
    if not groups:
        raise UsageError("no cached tasks to draw; ifp cache add adds one")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ifp_mlx.storage.files import atomic_path

    num_tasks = sum(len(group.entries) for group in groups)
    figure, every_axes = pyplot.subplots(
        len(groups), 1, figsize=(9, 1.2 * len(groups) + 0.35 * num_tasks), squeeze=False
    )
    for group, axes in zip(groups, every_axes[:, 0], strict=True):
        labels: list[str] = []
        _draw_family(axes, group.tree, group, labels)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(1.02, min(group.overlaps.min(), 0.98) - 0.02)
        axes.set_xlabel("overlap of kept units, mean over layers")
        axes.set_title(group.heading, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def _draw_family(axes: Any, family: Family, group: _Group, labels: list[str]) -> float:
    """Draw one family's branches and return the height at which its own branch begins."""
    if not family.parts:
        labels.append(title(group.entries[family.members[0]].key.task))
        return len(labels) - 1.0
    heights = [_draw_family(axes, part, group, labels) for part in family.parts]
    for part, height in zip(family.parts, heights, strict=True):
        axes.plot([part.overlap, family.overlap], [height, height], color="0.3", linewidth=1.2)
    axes.plot([family.overlap] * 2, heights, color="0.3", linewidth=1.2)
    return sum(heights) / 2

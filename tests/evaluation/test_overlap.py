"""Overlap analysis against a NumPy oracle, its chance level, and the heat maps."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.evaluation.controls import UnitMasks, unit_masks
from ifp_mlx.evaluation.heat_maps import write_heat_maps
from ifp_mlx.evaluation.overlap import overlap
from ifp_mlx.evaluation.quality import HeldOutExample
from ifp_mlx.selection.selectors import NamedSelector, RandomSelector
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.units.kinds import UnitShape

DOMAINS = ("alpha", "beta", "gamma")


def make_masks(num_inputs: int, layers: int, units: int, kept: int, seed: int = 0) -> UnitMasks:
    rng = np.random.default_rng(seed)
    examples, rows = [], []
    for index in range(num_inputs):
        examples.append(HeldOutExample((index, 1), 1, DOMAINS[index % len(DOMAINS)]))
        chosen = [rng.permutation(units)[:kept] for _ in range(layers)]
        row = np.zeros((layers, units), dtype=bool)
        for layer, indices in enumerate(chosen):
            row[layer, indices] = True
        rows.append(row)
    return UnitMasks(examples, np.stack(rows))


def test_overlap_equals_sets_counted_pair_by_pair() -> None:
    masks = make_masks(7, layers=2, units=24, kept=9)
    analysis = overlap(masks)
    assert analysis.domains == DOMAINS
    assert analysis.num_inputs == (3, 2, 2)
    for layer in range(2):
        sets = [set(np.flatnonzero(row[layer])) for row in masks.kept]
        for (a, one), (b, other) in itertools.product(enumerate(DOMAINS), repeat=2):
            values = [
                len(sets[i] & sets[j]) / 9
                for i, j in itertools.product(range(7), repeat=2)
                if i != j and masks.examples[i].domain == one and masks.examples[j].domain == other
            ]
            assert analysis.by_layer[layer, a, b] == pytest.approx(np.mean(values), abs=1e-6)
        matrix = analysis.by_layer[layer]
        assert analysis.within[layer] == pytest.approx(np.mean(np.diag(matrix)))
        apart = [matrix[a, b] for a, b in itertools.permutations(range(3), 2)]
        assert analysis.between[layer] == pytest.approx(np.mean(apart))


def test_random_masks_overlap_at_chance() -> None:
    """The mean over 4 layers of 780 pairs: 6 of its standard deviations are below 0.01."""

    shape = UnitShape((0, 1, 2, 3), 192)

    def instruction(example: HeldOutExample) -> tuple[NamedSelector, tuple[int, ...]]:
        seed = example.token_ids[0]
        selector, spec = RandomSelector(shape, seed), SelectorSpec("random", str(seed))
        return NamedSelector(selector, spec, "ffn", shape), ()

    examples = [HeldOutExample((i, 1), 1, DOMAINS[i % 2]) for i in range(40)]
    analysis = overlap(unit_masks(examples, instruction, [64])[64])
    assert analysis.chance == pytest.approx(1 / 3)
    assert analysis.within.mean() == pytest.approx(1 / 3, abs=0.01)
    assert analysis.between.mean() == pytest.approx(1 / 3, abs=0.01)
    assert analysis.above_chance(analysis.between).mean() == pytest.approx(0.0, abs=0.015)


def test_identical_masks_overlap_wholly() -> None:
    masks = make_masks(6, layers=2, units=20, kept=7)
    same = UnitMasks(masks.examples, np.broadcast_to(masks.kept[:1], masks.kept.shape))
    analysis = overlap(same)
    assert np.allclose(analysis.by_layer, 1.0)
    assert np.allclose(analysis.above_chance(analysis.within), 1.0)


def test_overlap_counts_beyond_a_byte() -> None:
    """Shared units are counted in float32: 300 of them would overflow eight bits."""
    kept = np.ones((2, 1, 400), dtype=bool)
    kept[:, :, 300:] = False
    examples = [HeldOutExample((i, 1), 1, "alpha") for i in range(2)]
    assert overlap(UnitMasks(examples, kept)).by_layer[0, 0, 0] == 1.0


def test_one_domain_has_no_overlap_between_domains() -> None:
    examples = [HeldOutExample((i, 1), 1, "alpha") for i in range(3)]
    analysis = overlap(UnitMasks(examples, make_masks(3, 2, 10, 4).kept))
    assert np.isnan(analysis.between).all()
    record = analysis.to_dict()
    assert record["mean"]["between"] is None
    json.dumps(record, allow_nan=False)


def test_overlap_refuses_what_says_nothing() -> None:
    lonely = make_masks(4, layers=1, units=10, kept=4)  # alpha has two inputs, the others one
    with pytest.raises(UsageError, match="two inputs of each domain; beta has one"):
        overlap(lonely)
    examples = [HeldOutExample((i, 1), 1, "alpha") for i in range(2)]
    with pytest.raises(UsageError, match="every unit is kept"):
        overlap(UnitMasks(examples, np.ones((2, 1, 10), dtype=bool)))


def test_heat_maps_are_three_pictures(tmp_path: Path) -> None:
    analysis = overlap(make_masks(6, layers=5, units=20, kept=7))
    paths = write_heat_maps(analysis, tmp_path / "maps")
    names = ["overlap-first-layer.png", "overlap-middle-layer.png", "overlap-last-layer.png"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(names)


def test_heat_maps_without_matplotlib_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install 'ifp-mlx"):
        write_heat_maps(overlap(make_masks(6, layers=2, units=20, kept=7)), tmp_path)
    assert not list(tmp_path.iterdir())


def run(arguments: list[str]) -> int:
    from ifp_mlx.cli.app import run as run_command

    return run_command(arguments)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for domain, words in {"sums": ("2+2", "3+5", "7-1"), "songs": ("la", "sol", "mi")}.items():
        lines = [json.dumps({"prompt": word, "response": word[::-1]}) for word in words]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    return folder


def test_overlap_command_prints_json(
    tiny_checkpoint: Callable[..., Path],
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(tiny_checkpoint())
    maps = tmp_path / "maps"
    arguments = ["overlap", "--data", str(texts), "--selector", "prompt", "--keep-units", "64"]
    assert run([*arguments, "--model", model, "--heat-maps", str(maps), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["row"] == "prompt@64"
    assert report["domains"] == ["songs", "sums"]
    assert report["num_inputs"] == [3, 3]
    assert len(report["layers"]) == 3
    assert report["chance"] == pytest.approx(64 / 192)
    assert len(list(maps.iterdir())) == 3
    assert mx.array(report["mean"]["matrix"]).shape == (2, 2)


def test_eval_measures_overlap_as_the_former_command_did(
    tiny_checkpoint: Callable[..., Path], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(texts), "--model", str(tiny_checkpoint()), "--selector", "prompt"]
    assert run(["overlap", *common, "--keep-units", "64", "--json"]) == 0
    former = json.loads(capsys.readouterr().out)
    assert run(["eval", "--overlap", *common, "--keep", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == former


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--overlap", "--selector", "prompt", "--keep", "64", "--keep", "128"], "one --keep"),
        (["--overlap", "--kl"], "pass --data alone"),
        (["--heat-maps", "x"], "add --overlap"),
    ],
)
def test_eval_refuses_overlaps_that_cannot_be(
    tiny_checkpoint: Callable[..., Path],
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    assert run(["eval", "--data", str(texts), "--model", str(tiny_checkpoint()), *extra]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert not captured.out


def test_overlap_command_prints_a_line_a_layer(
    tiny_checkpoint: Callable[..., Path], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["overlap", "--data", str(texts), "--selector", "random", "--keep", "0.5"]
    assert run([*arguments, "--model", str(tiny_checkpoint())]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["1", "2", "3", "mean"]
    assert lines[-1][1:] == ["1.000"] * 4  # random units are the same for every input


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--selector", "dense"], "whole model has no sub-networks"),
        (["--selector", "static"], "needs a calibration"),
        (["--selector", "random", "--keep", "1"], "every unit is kept"),
    ],
)
def test_overlap_command_refuses(
    tiny_checkpoint: Callable[..., Path],
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    arguments = ["overlap", "--data", str(texts), "--model", str(tiny_checkpoint()), *extra]
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert not captured.out

"""Mixtures on the command line: amounts, and one line for what cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def mixture(write_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a mixture of 8 experts in two groups, 2 a token."""
    return write_tiny_checkpoint(tmp_path / "mixture", "deepseek_v3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep-experts", "2"), "must be between 4 and 8 experts, not 2"),
        (("--keep-experts", "9"), "must be between 4 and 8 experts, not 9"),
        (("--keep-experts", "5"), "must be a multiple of 2 or 8; nearest to 5: 4 or 6"),
        (("--keep", "0"), "must be above 0 and at most 1, not 0"),
        (("--memory", "1MB"), "no amount of units fits"),
        (("--memory", "a lot"), "is no size; write 9GB or 800MB"),
    ],
)
def test_amounts_that_cannot_be_are_one_line(
    ifp: Run, mixture: Path, flags: tuple[str, str], message: str
) -> None:
    outcome = ifp("generate", "hi", "--task", "write", "-m", "2", "--model", mixture, *flags)
    assert outcome.code in (1, 2)
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("ifp: ")
    assert message in last
    assert not outcome.stdout


def test_a_task_takes_as_many_experts_as_fit(ifp: Run, mixture: Path) -> None:
    from ifp_mlx.storage.weights import automatic_dtype, load_model
    from ifp_mlx.subnets.memory import checkpoint_sizes

    dtype = automatic_dtype(load_model(mixture, lazy=True)[0])
    peak = checkpoint_sizes(mixture, dtype).predict(6, 4096).total_bytes
    task = ("--model", mixture, "--memory", f"{peak / 1e6 + 0.001:.3f}MB")
    added = ifp("cache", "add", "write", *task, "--json")
    assert json.loads(added.stdout)["num_kept_units"] == 6
    said = ifp("generate", "hi", "--task", "write", "-m", "2", *task)
    assert 'cache hit for "write": 6 of 8 experts' in said.stderr


def test_half_of_the_experts_is_called_risky(ifp: Run, mixture: Path) -> None:
    arguments = ("generate", "hi", "--task", "write", "-m", "2", "--model", mixture)
    assert "50% of the experts: risky" in ifp(*arguments, "--keep", "0.5").stderr
    assert "risky" not in ifp(*arguments, "--keep", "0.75").stderr


def test_eval_measures_a_mixture(ifp: Run, mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    lines = [{"prompt": f"count {n}", "response": "one two three"} for n in range(3)]
    (tmp_path / "text" / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = "dense,prompt@6,random@4"
    outcome = ifp(
        "eval", "--data", tmp_path / "text", "--rows", rows, "--kl", "--model", mixture, "--json"
    )
    assert outcome.code == 0, outcome.stderr
    whole, most, half = json.loads(outcome.stdout)["rows"]
    kl = [row["domains"]["sums"]["kl"] for row in (whole, most, half)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert 0 < kl[1] < kl[2]

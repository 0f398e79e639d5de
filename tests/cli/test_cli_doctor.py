import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def pulled(ifp: Run, small_model: Path, tmp_path: Path) -> Path:
    """Return the models folder, with one model in it."""
    folder = tmp_path / "home" / "models" / "small"
    shutil.copytree(small_model, folder)
    return folder.parent


def test_doctor_tells_how_to_get_the_default_model(ifp: Run) -> None:
    outcome = ifp("doctor")
    assert outcome.code == 0
    assert "none yet; run: ifp pull smollm2-135m" in outcome.stdout
    for part in ("ifp 0.1.0", "mlx-lm", "usable memory", "sub-networks", "free"):
        assert part in outcome.stdout


def test_doctor_tells_what_fits(ifp: Run, pulled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = json.loads(ifp("doctor", "--json").stdout)["models"][0]
    assert (model["name"], model["num_units"], model["largest_k"]) == ("small", 192, 192)
    assert "which fits" in ifp("doctor").stdout
    dense_bytes = model["dense_bytes"]
    monkeypatch.setattr("ifp_mlx.subnets.memory.usable_memory_bytes", lambda: dense_bytes - 1000)
    found = " ".join(ifp("doctor").stdout.split())
    assert "192 FFN units, does not fit in" in found
    assert "; 75 % " in found
    assert "of 192 is the most that fits" in found
    monkeypatch.setattr("ifp_mlx.subnets.memory.usable_memory_bytes", lambda: 1000)
    assert "not even 64 FFN units fit" in ifp("doctor").stdout


def test_doctor_names_a_damaged_model(ifp: Run, pulled: Path) -> None:
    (pulled / "small" / "config.json").write_text("{")
    outcome = ifp("doctor")
    assert outcome.code == 0
    assert "small: " in outcome.stdout
    assert "config.json" in outcome.stdout


def test_doctor_self_test_prints_a_block_without_private_paths(
    ifp: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ifp_mlx.slicing.self_test import Speed

    monkeypatch.setattr(
        "ifp_mlx.slicing.self_test.measure_speed", lambda: [Speed(64, 1_000_000, 10.0)]
    )
    outcome = ifp("doctor", "--self-test")
    assert outcome.code == 0
    assert outcome.stdout.startswith("```text\n")
    assert outcome.stdout.endswith("```\n")
    assert "ok   slicing equals masking: llama" in outcome.stdout
    assert str(tmp_path) not in outcome.stdout


def test_doctor_self_test_that_fails_exits_1(ifp: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ifp_mlx.slicing.self_test import Check

    monkeypatch.setattr("ifp_mlx.slicing.self_test.run_checks", lambda: [Check("sums", 1.0, 0.5)])
    monkeypatch.setattr("ifp_mlx.slicing.self_test.measure_speed", lambda: [])
    outcome = ifp("doctor", "--self-test")
    assert outcome.code == 1
    assert "FAIL sums: 1 (limit 5e-01)" in outcome.stdout
    assert not json.loads(ifp("doctor", "--self-test", "--json").stdout)["self_test"]["checks"][0][
        "passed"
    ]

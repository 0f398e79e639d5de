import dataclasses
import itertools

import mlx.core as mx
import pytest

from ifp_mlx.slicing import self_test
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.self_test import Check, measure_speed, run_checks


def test_checks_pass_on_this_machine() -> None:
    checks = list(run_checks())
    assert len(checks) >= 10
    assert [check.name for check in checks if not check.passed] == []


def test_checks_notice_a_wrong_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slice_model

    def off_by_one(model, selection):  # type: ignore[no-untyped-def]
        pick = selection.pick
        indices = mx.concatenate([pick.indices[:, :1] * 0, pick.indices[:, 1:]], axis=1)
        wrong = dataclasses.replace(pick, indices=indices)
        return right(model, dataclasses.replace(selection, picks=(wrong,)))

    monkeypatch.setattr(self_test, "slice_model", off_by_one)
    failed = [check.name for check in run_checks() if not check.passed]
    assert any("slicing equals masking: llama" in name for name in failed)


def test_check_of_nan_fails() -> None:
    assert not Check("x", float("nan"), 1.0).passed
    assert Check("x", 0.0, 0.0).passed


def test_measure_speed_cuts_more_each_time() -> None:
    speeds = list(measure_speed(num_layers=2, hidden_size=256, num_units=512, num_tokens=2))
    assert [speed.num_kept_units for speed in speeds] == [512, 320, 256, 128]
    pairs = itertools.pairwise(speeds)
    assert all(more.num_parameters > fewer.num_parameters for more, fewer in pairs)
    assert all(speed.tokens_per_s > 0 for speed in speeds)

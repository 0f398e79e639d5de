"""Scores of experts, from sums over what a layer did."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import UsageError
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.selection.expert_statistics import CRITERIA, ExpertStatistics
from ifp_mlx.units.routing import Routing, with_observed_experts

ModelFactory = Callable[..., nn.Module]

TEXTS = ([3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 2])


def routings(model: nn.Module) -> list[list[tuple[int, float, float]]]:
    """Return (expert, gate, norm) of each choice of each layer, over both texts."""
    found: list[list[tuple[int, float, float]]] = [[] for _ in model.layers]
    for text in TEXTS:
        seen: list[Routing] = []
        with_observed_experts(model, lambda _, routing, seen=seen: seen.append(routing))(  # type: ignore[misc]
            mx.array([text])
        )
        for layer, routing in zip(found, seen, strict=True):
            arrays = (routing.experts, routing.gates, routing.norms)
            layer += zip(*(np.array(array).ravel().tolist() for array in arrays), strict=True)
    return found


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_sums_over_tokens(tiny_model: ModelFactory, criterion: str) -> None:
    model = tiny_model("olmoe")
    expected = np.zeros((3, 8))
    for layer, choices in enumerate(routings(model)):
        for expert in range(8):
            own = [(gate, norm) for e, gate, norm in choices if e == expert]
            total = {
                "contribution": sum(gate * norm for gate, norm in own) / 13,
                "frequency": len(own) / 13,
                "gate": sum(gate for gate, _ in own) / 13,
                "reap": sum(gate * norm for gate, norm in own) / max(len(own), 1),
                "norm": sum(norm for _, norm in own) / max(len(own), 1),
            }
            expected[layer, expert] = total[criterion]
    statistics = ExpertStatistics(model)
    statistics.read(TEXTS)
    np.testing.assert_allclose(np.array(statistics.score(criterion)), expected, rtol=1e-4)


def test_calibration_keeps_a_prior_and_what_tasks_need(tiny_model: ModelFactory) -> None:
    model = tiny_model("olmoe")
    examples = [CalibrationExample(text, task) for text, task in zip(TEXTS, "ab", strict=True)]
    calibration = calibrate(model, examples)
    both = ExpertStatistics(model)
    for name, text in zip("ab", TEXTS, strict=True):
        alone = ExpertStatistics(model)
        alone.read([text])
        both.read([text])
        assert mx.allclose(calibration.task_importance(name), alone.score("contribution"))
    assert mx.allclose(calibration.importance, both.score("norm"))


def test_unknown_criterion_is_refused_with_the_list(tiny_model: ModelFactory) -> None:
    with pytest.raises(UsageError, match="no criterion 'best'; there are: contribution, freq"):
        ExpertStatistics.of_instructions(tiny_model("olmoe"), TEXTS, "best")

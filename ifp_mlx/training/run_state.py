"""Checkpoints of a run: a resumed run continues bit for bit.

Everything random is drawn from the seed and the step number, so a checkpoint holds weights,
moments and counters and nothing else.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ifp_mlx.errors import TrainingError
from ifp_mlx.storage.files import staged_directory

if TYPE_CHECKING:
    from ifp_mlx.training.optimizer import AdamW
    from ifp_mlx.training.trainer import Trainer

_WEIGHTS = "state.safetensors"
_COUNTERS = "state.json"


def save_run_state(trainer: "Trainer", folder: Path) -> None:
    """Write a run's state to a folder, whole or not at all; the one before it goes."""
    arrays = _arrays("model", trainer.state)
    counters = {
        "step": trainer.step_number,
        "digest": trainer.config.digest(),
        "updates": trainer.state.updates,
    }
    if trainer.predictor is not None:
        arrays |= _arrays("head", trainer.predictor.state)
        counters |= {
            "head_updates": trainer.predictor.state.updates,
            "frozen": trainer.predictor.frozen,
            "rollbacks": trainer.predictor.rollbacks,
            "start_overlap": trainer.predictor.start_overlap,
        }
    with staged_directory(folder, overwrite=True) as staging:
        mx.save_safetensors(str(staging / _WEIGHTS), arrays)
        (staging / _COUNTERS).write_text(json.dumps(counters))


def load_run_state(trainer: "Trainer", folder: Path) -> None:
    """Set a fresh trainer to where a checkpoint was written.

    Raises:
        TrainingError: there is no checkpoint, or it is of another run.
    """
    try:
        counters = json.loads((folder / _COUNTERS).read_text())
        arrays = mx.load(str(folder / _WEIGHTS))
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{folder} holds no checkpoint to resume from: {error}") from error
    if counters["digest"] != trainer.config.digest():
        raise TrainingError(f"{folder} is the checkpoint of a run with another configuration")
    assert isinstance(arrays, dict)
    _restore("model", trainer.state, arrays, counters["updates"])
    trainer.step_number = counters["step"]
    if trainer.predictor is not None:
        _restore("head", trainer.predictor.state, arrays, counters["head_updates"])
        trainer.predictor.frozen = counters["frozen"]
        trainer.predictor.rollbacks = counters["rollbacks"]
        trainer.predictor.start_overlap = counters["start_overlap"]
        trainer.predictor.install()


def _arrays(prefix: str, state: "AdamW") -> dict[str, mx.array]:
    return {
        f"{prefix}.weights": state.weights,
        f"{prefix}.first": state.first,
        f"{prefix}.second": state.second,
    }


def _restore(prefix: str, state: "AdamW", arrays: dict[str, mx.array], updates: int) -> None:
    state.weights = arrays[f"{prefix}.weights"]
    state.first = arrays[f"{prefix}.first"]
    state.second = arrays[f"{prefix}.second"]
    state.updates = updates

"""Checkpoints of a run: a resumed run continues bit for bit.

Everything random is drawn from the seed and the step number, so a checkpoint holds weights,
moments and counters and nothing else.
"""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx

from ifp_mlx.errors import TrainingError
from ifp_mlx.storage.files import staged_directory
from ifp_mlx.training.optimizer import AdamW

_WEIGHTS = "state.safetensors"
_COUNTERS = "state.json"
_VECTORS = ("weights", "first", "second")


@dataclasses.dataclass(frozen=True)
class HeadState:
    """Where the training of the predictor's head is.

    Attributes:
        state: its weights and moments.
        frozen: it does not move any more.
        rollbacks: how often it was set back.
        start_overlap: of the probe batch's masks when training began.
    """

    state: AdamW
    frozen: bool
    rollbacks: int
    start_overlap: float


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a run is.

    Attributes:
        digest: of the run's configuration.
        step_number: steps that are done.
        model: the language model's weights and moments.
        head: None for a run without masks.
    """

    digest: str
    step_number: int
    model: AdamW
    head: HeadState | None

    def save(self, folder: Path) -> None:
        """Write it to a folder, whole or not at all; the one before it goes."""
        arrays = _arrays("model", self.model)
        counters = {
            "step": self.step_number,
            "digest": self.digest,
            "updates": self.model.updates,
        }
        if self.head is not None:
            arrays |= _arrays("head", self.head.state)
            counters |= {
                "head_updates": self.head.state.updates,
                "frozen": self.head.frozen,
                "rollbacks": self.head.rollbacks,
                "start_overlap": self.head.start_overlap,
            }
        with staged_directory(folder, overwrite=True) as staging:
            mx.save_safetensors(str(staging / _WEIGHTS), arrays)
            (staging / _COUNTERS).write_text(json.dumps(counters))

    @classmethod
    def load(cls, folder: Path, digest: str) -> "RunState":
        """Return what ``save`` wrote.

        Args:
            folder: the checkpoint.
            digest: of the configuration that the run goes on with.

        Raises:
            TrainingError: there is no checkpoint, or it is of another run.
        """
        try:
            counters = json.loads((folder / _COUNTERS).read_text())
            arrays = mx.load(str(folder / _WEIGHTS))
        except (OSError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{folder} holds no checkpoint to resume from: {error}") from error
        if counters["digest"] != digest:
            raise TrainingError(f"{folder} is the checkpoint of a run with another configuration")
        assert isinstance(arrays, dict)
        head = None
        if "head_updates" in counters:
            head = HeadState(
                _optimizer_state("head", arrays, counters["head_updates"]),
                counters["frozen"],
                counters["rollbacks"],
                counters["start_overlap"],
            )
        model = _optimizer_state("model", arrays, counters["updates"])
        return cls(counters["digest"], counters["step"], model, head)


def _arrays(prefix: str, state: AdamW) -> dict[str, mx.array]:
    return {f"{prefix}.{name}": getattr(state, name) for name in _VECTORS}


def _optimizer_state(prefix: str, arrays: dict[str, mx.array], updates: int) -> AdamW:
    weights, first, second = (arrays[f"{prefix}.{name}"] for name in _VECTORS)
    return AdamW(weights, first, second, updates)

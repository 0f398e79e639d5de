"""What this package ships for well-known models: calibration and trained adapter."""

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "data"

# What tells the default model from others of its family. Weights are checked by the adapter.
_SMOLLM2_135M = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


def find_shipped(config: dict[str, Any]) -> Path | None:
    """Return the folder of what is shipped for a model of this configuration, or None."""
    if all(config.get(name) == value for name, value in _SMOLLM2_135M.items()):
        return _FOLDER / "smollm2-135m"
    return None

"""What this package ships for well-known models: calibration and trained adapter."""

from pathlib import Path

from ifp_mlx.units.model_config import ModelConfig

_FOLDER = Path(__file__).parents[1] / "data"

# What tells the default model from others of its family. Weights are checked by the adapter.
_SMOLLM2_135M = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


def find_companion(model_path: Path, config: ModelConfig, name: str) -> Path | None:
    """Return what belongs to a checkpoint under a name, or None.

    The checkpoint's own ``ifp/`` folder comes before what this package ships for a model of this
    configuration.
    """
    folders = [model_path / "ifp"]
    if all(config.content.get(key) == value for key, value in _SMOLLM2_135M.items()):
        folders.append(_FOLDER / "smollm2-135m")
    return next((folder / name for folder in folders if (folder / name).exists()), None)

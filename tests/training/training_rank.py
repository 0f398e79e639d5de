"""One process of a run over several: trains on what FOLDER holds; the first one writes TARGET."""

import json
import sys
from pathlib import Path

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import mlx.core as mx  # noqa: E402

from ifp_mlx.storage.weights import load_model  # noqa: E402
from ifp_mlx.text.examples import ExampleSet  # noqa: E402
from ifp_mlx.training.config import TrainingConfig, config_from_dict  # noqa: E402
from ifp_mlx.training.trainer import Trainer  # noqa: E402
from ifp_mlx.training.warm_start import WarmStart  # noqa: E402

folder = Path(sys.argv[1])
model, _ = load_model(folder / "model")
config = config_from_dict(TrainingConfig, json.loads((folder / "config.json").read_text()))
warm_start = WarmStart.load(folder / "warm")
rank = mx.distributed.init().rank()
if rank > 0:  # what another process made is not used
    warm_start.head.project.weight = -warm_start.head.project.weight
weights = Trainer(model, ExampleSet.load(folder / "examples"), config, warm_start).run().weights
if rank == 0:
    mx.save_safetensors(sys.argv[2], weights)

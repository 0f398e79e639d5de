"""A checkpoint and what belongs to it: its adapter, its calibration, the selector they allow."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ifp_mlx.adapters.adapter import Adapter, load_adapter
from ifp_mlx.adapters.shipped import find_companion
from ifp_mlx.errors import AdapterError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.subnets.dense_model import DenseModel
from ifp_mlx.subnets.selectors import SELECTORS, SelectorFiles
from ifp_mlx.units.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A checkpoint and what belongs to it, read or found.

    Attributes:
        path: the checkpoint directory.
        config: its configuration.
        adapter: the IFP adapter in use, if any.
        calibration: the calibrated prior, if any.
        selector: which selector is in use.
    """

    path: Path
    config: ModelConfig
    adapter: Adapter | None
    calibration: Calibration | None
    selector: SelectorSpec

    @property
    def for_selectors(self) -> SelectorFiles:
        """What selectors are made from."""
        return SelectorFiles(self.adapter, self.calibration)

    @property
    def is_adapted(self) -> bool:
        """Whether the adapter's changes are applied: they belong to its own predictor's units."""
        return self.adapter is not None and SELECTORS[self.selector.name].needs == "adapter"

    @property
    def adapter_fingerprint(self) -> str:
        """Empty without an adapter."""
        return "" if self.adapter is None else self.adapter.fingerprint


def find_calibration(path: Path, config: ModelConfig, named: Path | None) -> Calibration | None:
    """Return the named calibration, else the one that belongs to a checkpoint, if there is one."""
    found = named or find_companion(path, config, "calibration.safetensors")
    return Calibration.load(found) if found else None


def find_adapter(path: Path, config: ModelConfig, named: Path | None) -> Adapter | None:
    """Return the named adapter, else the one that belongs to a checkpoint; not verified yet."""
    found = named or find_companion(path, config, "adapter")
    return load_adapter(found, verify=False) if found else None


def misfit(adapter: Adapter, open_dense: Callable[[], DenseModel]) -> str | None:
    """Return why an adapter does not belong to the model, None if it does. Evaluates."""
    try:
        adapter.check_base(open_dense().reader)
    except AdapterError as error:
        return str(error)
    return None

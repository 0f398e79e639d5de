"""Where things are kept: one folder if ``IFP_HOME`` names it, else the platform's own places."""

import os
from pathlib import Path

import platformdirs

_APP = "ifp-mlx"


def home_folder() -> Path:
    """Return ``IFP_HOME``, or the user's data folder of this platform."""
    named = os.environ.get("IFP_HOME")
    return Path(named).expanduser() if named else Path(platformdirs.user_data_dir(_APP))


def models_folder() -> Path:
    """Return where ``ifp pull`` puts models."""
    return home_folder() / "models"


def sessions_folder() -> Path:
    """Return where chats are recorded."""
    return home_folder() / "sessions"


def fits_folder() -> Path:
    """Return where the measurements of ``ifp fit`` are kept."""
    return home_folder() / "fits"


def task_settings_folder() -> Path:
    """Return where the settings of tasks are kept."""
    return home_folder() / "tasks"


def presets_folder() -> Path:
    """Return where the user's presets are kept."""
    return home_folder() / "presets"


def subnet_cache_folder() -> Path:
    """Return where sub-networks are cached."""
    named = os.environ.get("IFP_HOME")
    root = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir(_APP))
    return root / "subnets"

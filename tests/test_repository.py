"""The repository keeps its own promises: links, lists, imports, what the package ships."""

import subprocess
import sys
from pathlib import Path

import pytest

import ifp_mlx.cli
import ifp_mlx.convert

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["cli", "convert"])
def test_root_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "ifp_mlx" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_linked_packages_have_one_import_name() -> None:
    assert Path(ifp_mlx.cli.__file__).resolve() == ROOT / "cli" / "__init__.py"
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cli"
    run = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert run.returncode == 1
    assert "import ifp_mlx.cli, not cli" in run.stderr


@pytest.mark.parametrize(
    "script",
    [
        "make_files.py",
        "make_fit.py",
        "make_readme.py",
        "make_chat.py",
        "make_experts.py",
        "make_function.py",
        "make_latency.py",
        "make_memory.py",
        "make_server.py",
        "make_training_log.py",
    ],
)
def test_what_is_written_from_other_files_is_current(script: str) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

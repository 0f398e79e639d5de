"""Check the built wheel and sdist: contents, sizes, and that the wheel runs away from this tree.

    python docs/check_release.py dist

Installs the wheel into an empty environment in a temporary folder and runs ``ifp --version`` and
``ifp doctor`` there. Exits with 1 and one line for each thing that is wrong.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

MOST_BYTES = 60 << 20  # adapters may have 60 MiB, everything else is small
REQUIRED = (
    "ifp_mlx/py.typed",
    "ifp_mlx/cli/app.py",
    "ifp_mlx/convert/conversion.py",
    "ifp_mlx/data/smollm2-135m/calibration.safetensors",
    "ifp_mlx/data/smollm2-135m/adapter/adapter-00.safetensors",
    "ifp_mlx/server/page/index.html",
)
UNWANTED = ("tests/", "benchmarks/", "docs/", "cli/", "convert/")


def wheel_faults(path: Path) -> list[str]:
    """Return what is missing from a wheel, and what it should not hold."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    faults = [f"{path.name} lacks {name}" for name in REQUIRED if name not in names]
    faults += [f"{path.name} holds {name}" for name in names if name.startswith(UNWANTED)]
    return faults + _size_faults(path)


def sdist_faults(path: Path) -> list[str]:
    """Return what is missing from an sdist."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("pyproject.toml", "README.md", "LICENSE", *REQUIRED)
    return [f"{path.name} lacks {name}" for name in wanted if name not in names] + _size_faults(
        path
    )


def _size_faults(path: Path) -> list[str]:
    size = path.stat().st_size
    return [f"{path.name} has {size / 1e6:.0f} MB"] if size > MOST_BYTES else []


def run_installed(wheel: Path) -> list[str]:
    """Install a wheel into an empty environment and return what fails there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder) / "bin"
        subprocess.run([binaries / "pip", "install", "--quiet", str(wheel.resolve())], check=True)
        environment = {**os.environ, "IFP_HOME": f"{folder}/home"}
        environment.pop("PYTHONPATH", None)
        faults = []
        for command in (["--version"], ["doctor"], ["models", "list"]):
            done = subprocess.run(
                [binaries / "ifp", *command],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            sys.stdout.write(f"$ ifp {' '.join(command)}\n{done.stdout}")
            if done.returncode:
                faults.append(f"ifp {' '.join(command)} ends with {done.returncode}: {done.stderr}")
    return faults


def main() -> int:
    """Check every distribution in a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    for path in (wheel, sdist):
        sys.stdout.write(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB\n")
    faults = wheel_faults(wheel) + sdist_faults(sdist) + run_installed(wheel)
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

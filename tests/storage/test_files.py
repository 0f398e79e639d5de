"""Two at once: one writes a folder, the other says so; what is there is whole."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ifp_mlx.errors import ResourceError, UsageError
from ifp_mlx.storage.files import (
    FilesInUse,
    atomic_path,
    is_in_use,
    staged_directory,
    write_bytes_atomically,
)
from ifp_mlx.storage.weights import load_model

CONVERT = """
import sys
from pathlib import Path
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.errors import UsageError
sys.stdin.readline()
try:
    convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=sys.argv[3] == "overwrite")
except UsageError as error:
    sys.exit(f"said: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["new", "overwrite"])
def test_of_converts_to_one_folder_one_wins_and_the_others_say_so(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    source, target = tiny_checkpoint(), tmp_path / "made" / "model"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT, source, target, how],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes[0] == 0, errors
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0 or error.startswith("said: "), error
    if how == "new":
        assert codes == [0, 1, 1, 1]
    assert load_model(target)[1]["hidden_size"] == 32
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_folder_made_meanwhile_by_something_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with (
        pytest.raises(UsageError, match="was made by something else meanwhile; it stays"),
        staged_directory(target),
    ):
        (target / "theirs").mkdir(parents=True)
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_name_with_wildcards_does_not_touch_its_neighbours(tmp_path: Path) -> None:
    neighbour = tmp_path / ".ab.partial-x"
    neighbour.mkdir()
    with staged_directory(tmp_path / "[a]b"):
        pass
    assert neighbour.is_dir()


def test_folders_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "folder" / "x"
    with pytest.raises(ResourceError, match=r"cannot write .*: Not a directory"):
        write_bytes_atomically(path, b"")
    with pytest.raises(ResourceError, match=r"cannot write .*: Not a directory"), atomic_path(path):
        pass
    with (
        pytest.raises(ResourceError, match=r"cannot write beside .*: Not a directory"),
        staged_directory(path),
    ):
        pass


def test_a_file_in_use_is_seen_by_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "task"
    path.write_text("")
    code = (
        "import sys; from pathlib import Path; from ifp_mlx.storage.files import FilesInUse\n"
        "files = FilesInUse(); files.hold(Path(sys.argv[1])); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline()
        assert is_in_use(path)
        process.kill()
    assert not is_in_use(path)
    FilesInUse().hold(tmp_path / "none")  # passed over


def test_a_process_remembers_the_latest_files_it_uses(tmp_path: Path) -> None:
    files, paths = FilesInUse(), [tmp_path / str(number) for number in range(9)]
    for path in paths:
        path.write_text("")
        files.hold(path)
    assert [is_in_use(path) for path in paths] == [False] + [True] * 8

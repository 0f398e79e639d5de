"""What ``import ifp_mlx`` offers is what it says, and costs nothing until it is used."""

import subprocess
import sys

import pytest

import ifp_mlx


@pytest.mark.parametrize("name", ifp_mlx.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(ifp_mlx, name)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(ifp_mlx)


def test_all_is_what_is_exported() -> None:
    assert sorted(ifp_mlx.__all__) == list(ifp_mlx.__all__)
    assert set(ifp_mlx._HOMES) == set(ifp_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Asistant'"):
        ifp_mlx.Asistant  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, ifp_mlx; "
        "print([name for name in sys.modules if name.partition('.')[0] in "
        "('mlx', 'mlx_lm', 'transformers', 'numpy')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

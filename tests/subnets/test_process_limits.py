import resource
from pathlib import Path

import pytest

from ifp_mlx.subnets import process_limits
from ifp_mlx.subnets.memory import usable_memory_bytes
from ifp_mlx.subnets.process_limits import process_limit_bytes


@pytest.mark.parametrize(("written", "limit"), [("123000\n", 123_000), ("max\n", None)])
def test_a_container_s_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, limit: int | None
) -> None:
    (tmp_path / "memory.max").write_text(written)
    files = (tmp_path / "memory.max", tmp_path / "none")
    monkeypatch.setattr(process_limits, "_CONTAINER_FILES", files)
    assert process_limit_bytes() == limit
    if limit:
        assert usable_memory_bytes() == limit


def test_a_shell_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_DATA: 2 * 10**9, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(process_limits, "_CONTAINER_FILES", ())
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1))
    assert process_limit_bytes() == usable_memory_bytes() == 2 * 10**9

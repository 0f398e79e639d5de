import base64
import io
import sys
from pathlib import Path

import pytest

from ifp_mlx.cli.clipboard import copy_to_clipboard
from ifp_mlx.errors import UsageError


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_copy_uses_the_systems_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "wl-copy"
    command.write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/copied\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert copy_to_clipboard("grüße\n") == "wl-copy"
    assert (tmp_path / "copied").read_text() == "grüße\n"


def test_copy_goes_through_the_terminal_if_the_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "xclip"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert "terminal" in copy_to_clipboard("text")
    assert terminal.getvalue() == f"\x1b]52;c;{base64.b64encode(b'text').decode()}\x07"


def test_copy_without_any_clipboard_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(UsageError, match="no clipboard here; install"):
        copy_to_clipboard("text")

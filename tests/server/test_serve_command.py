"""``ifp serve`` as a process: it says what it serves, drains on SIGTERM, and refuses bad flags."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ifp_mlx.cli.app import run
from ifp_mlx.cli.serve import parse_tasks
from ifp_mlx.errors import UsageError

COMMAND = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()", "serve"]


@pytest.fixture
def start(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Return a function: flags -> a serving process and its address."""
    processes: list[subprocess.Popen[str]] = []

    def run_server(*flags: str) -> tuple[subprocess.Popen[str], str]:
        model = ["--model", str(tiny_checkpoint()), "--port", "0", "--keep-units", "64"]
        environment = {**os.environ, "IFP_HOME": str(tmp_path / "home"), "IFP_API_KEY": "sesame"}
        process = subprocess.Popen(
            [*COMMAND, *model, *flags], env=environment, text=True, stderr=subprocess.PIPE
        )
        processes.append(process)
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on (http://\S+)", line):
                return process, found[1]
        raise AssertionError("".join(lines))

    yield run_server
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_work_and_exits_0(start: Callable[..., Any]) -> None:
    process, url = start("--task", "mail=write e-mails", "--task", "py=help me write Python")
    with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "tiny:mail", "tiny:py", "tiny:dense"]

        def ask() -> Any:
            messages: Any = [{"role": "user", "content": "a long farewell"}]
            return client.chat.completions.create(
                model="tiny:mail", messages=messages, max_tokens=400
            )

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert answer.result(60).usage.completion_tokens == 400
        assert process.wait(30) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_a_port_that_is_taken_is_one_line(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "--model", str(tiny_checkpoint()), "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--default-task", "mail"], "there is no task 'mail'"),
        (["--allowed-origins", "example.org"], "'example.org' is no origin"),
        (["--task", "write mails"], '--task NAME="write mails"'),
        (["--task", "a b=write mails"], "cannot name a task"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    assert run(["serve", "--model", str(tiny_checkpoint()), *flags]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message


def test_tasks_are_given_by_name() -> None:
    assert parse_tasks(["py=x = y", "mail=write"]) == {"py": "x = y", "mail": "write"}
    with pytest.raises(UsageError, match='--task NAME="help me"'):
        parse_tasks(["help me"])
    with pytest.raises(UsageError, match="given twice"):
        parse_tasks(["a=1", "a=2"])


@pytest.mark.slow
def test_open_shows_the_page_in_a_browser(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    _, url = start("--open")
    deadline = time.monotonic() + 20
    while not opened.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert opened.read_text().strip() == url.removesuffix("v1")
    with urllib.request.urlopen(opened.read_text().strip()) as page:
        assert b"<title>" in page.read()

"""Run every command block of README and docs as a reader would, a page at a time.

    ifp pull smollm2-135m && python docs/run_commands.py
    python docs/run_commands.py --page docs/chat.md
    python docs/run_commands.py --list     # what is not run, and why

Each page has a clone, a home and files of its own in a temporary folder. Status 1 if a command
fails, asks for another name, or prints what its page does not say. Needs the Python package index,
port 8080, and about half an hour of two CPU cores.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import documented_commands
from documented_commands import NOT_RUN, ROOT, SMALLER, Command

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import workplace  # noqa: E402

from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.errors import IFPError  # noqa: E402

TYPED = {"ifp chat": "Say only: yes.\n", "mlx_lm.chat": "Say only: yes.\nq\n"}
"""What is typed into commands that talk, by their first words."""

GETS_DEFAULT_MODEL = ("make demo", f"ifp pull {workplace.DEFAULT_MODEL}")
TRAINS = ("docs/training.md",)
"""Pages whose default model is a tiny one: training the real one takes a CPU hours."""

_HESITATES = re.compile(r"^ifp: | is now called ", re.MULTILINE)
"""An error where the exit code hides it, as mlx.launch's does, or a name of an earlier release."""

SERVER = "http://127.0.0.1:8080"
LIMIT_S = 900.0


class Shell:
    """Runs the commands of one page, each in a shell of its own.

    Args:
        folder: where they run.
        home: what ``IFP_HOME`` names.
        user: what ``~`` means, where a command says so.
    """

    def __init__(self, folder: Path, home: Path, user: Path):
        self._folder = folder
        self._user = user
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {
            "IFP_HOME": str(home),
            "PATH": path,
            "BROWSER": "true",  # for --open: a browser that is content with everything
            "NO_COLOR": "1",
        }
        self._server: subprocess.Popen[str] | None = None
        self._processes: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End what still runs, such as after Ctrl-C."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def run(self, command: Command, following: Command | None) -> str | None:
        """Run a command, or start it if it is a server; return what went wrong, or None.

        Args:
            command: to run.
            following: the next of the page: a server stays for what speaks with it.
        """
        process = self._start(command)
        if not command.text.startswith("ifp serve"):
            trouble = self._outcome(command, process)
        else:
            self._server = process
            trouble = _wait_until_it_answers(process)
        if self._server and not (following and SERVER in following.text):
            trouble = trouble or _stop(self._server)
            self._server = None
        return trouble

    def _start(self, command: Command) -> "subprocess.Popen[str]":
        script = "\n".join([*command.before, command.to_run])
        environment = self._environment
        if "~/" in command.text:
            environment = environment | {"HOME": str(self._user)}
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", script],
            cwd=self._folder, env=environment, text=True, start_new_session=True, errors="replace",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def _outcome(self, command: Command, process: "subprocess.Popen[str]") -> str | None:
        typed = next((text for start, text in TYPED.items() if command.text.startswith(start)), "")
        try:
            printed, said = process.communicate(typed, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"not done after {LIMIT_S:.0f} s"
        if process.returncode:
            return f"exit code {process.returncode}\n{_end(printed + said)}"
        if _HESITATES.search(said):
            return _end(said)
        if command.output is not None and printed.strip() != command.output:
            return f"the page says that it prints\n{command.output}\nnot\n{_end(printed)}"
        return None


def _wait_until_it_answers(server: "subprocess.Popen[str]") -> str | None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{SERVER}/health", timeout=5):
                return None
        except OSError:
            time.sleep(0.2)
    return "the server does not answer"


def _stop(server: "subprocess.Popen[str]") -> str | None:
    if server.poll() is None:
        server.terminate()
    _, said = server.communicate(timeout=LIMIT_S)
    return f"exit code {server.returncode}\n{_end(said)}" if server.returncode else None


def _end(output: str) -> str:
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-12:])


def run_page(page: Path, default_model: Path) -> list[str]:
    """Run the commands of a page, a line each; return what failed."""
    wanted = [c for c in documented_commands.commands(page) if c.reason_not_to_run is None]
    if not wanted:
        return []
    failed = []
    with tempfile.TemporaryDirectory(prefix="ifp-docs-") as name:
        root, home, user = (Path(name) / part for part in ("clone", "home", "user"))
        user.mkdir()
        workplace.clone(root)
        own = page.relative_to(ROOT).as_posix()
        folder = root / Path(own).parent if own.startswith("benchmarks/") else root
        workplace.add_files(folder)
        if any(".venv/bin/" in command.text for command in wanted):
            subprocess.run([sys.executable, "-m", "venv", root / ".venv"], check=True)
        gets_it = any(command.text in GETS_DEFAULT_MODEL for command in wanted)
        if own in TRAINS:
            default_model = folder / "MODEL"
        workplace.add_models(home, None if gets_it else default_model)
        with contextlib.closing(Shell(folder, home, user)) as shell:
            for command, following in zip(wanted, [*wanted[1:], None], strict=True):
                shown = command.text.replace("\n", " ")
                print(f"{command.page}:{command.line}: {shown[:90]}", flush=True)
                trouble = shell.run(command, following)
                if trouble:
                    print(f"  FAILED: {trouble}", flush=True)
                    failed.append(f"{command.page}:{command.line}: {shown}")
    return failed


def print_what_is_not_run() -> None:
    """Print the reasons, the commands of each, and those that are run otherwise than they stand."""
    for reason, texts in NOT_RUN.items():
        print(f"Not run ({reason}):")
        for text in texts:
            print(f"  {text}")
    print("Run with smaller numbers:")
    for text in SMALLER.values():
        print(f"  {text}")


def main() -> int:
    """Run the pages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, action="append", help="only this one")
    parser.add_argument("--list", action="store_true", help="only say what is not run, and why")
    options = parser.parse_args()
    if options.list:
        print_what_is_not_run()
        return 0
    try:
        model = resolve_model(workplace.DEFAULT_MODEL)
    except IFPError as error:
        sys.exit(str(error))
    pages = [path.resolve() for path in options.page or documented_commands.pages()]
    found = [command for page in pages for command in documented_commands.commands(page)]
    failed = [line for page in pages for line in run_page(page, model)]
    print_what_is_not_run()
    num_run = sum(command.reason_not_to_run is None for command in found)
    print(f"{num_run} commands run, {len(found) - num_run} not; {len(failed)} failed")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

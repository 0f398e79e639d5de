"""The user's own check of an answer: a command that says right or wrong."""

import json
import shlex
import subprocess

from ifp_mlx.errors import UsageError
from ifp_mlx.text.task_examples import TaskExample

DEFAULT_SECONDS = 60.0
"""Time that a check has for one answer."""


class CommandJudge:
    """Runs a command for each answer.

    It gets one JSON object on standard input, with ``prompt``, ``answer`` and ``expected`` (null
    where it is not known). Exit status 0 is right, 1 to 125 wrong. What it prints is thrown away.

    Args:
        command: as in a shell, but no shell runs it.
        seconds: after which it is stopped.

    Raises:
        UsageError: the command is empty, or its quotes do not match.
    """

    def __init__(self, command: str, seconds: float = DEFAULT_SECONDS):
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"`check`: {error}") from error
        if not self._words:
            raise UsageError("`check` is empty; name a command that judges answers")
        self._seconds = seconds

    def is_right(self, example: TaskExample, answer: str) -> bool:
        """Return the verdict on an answer.

        Raises:
            UsageError: the command cannot be run, was killed, or took too long.
        """
        request = {"prompt": example.prompt, "answer": answer, "expected": example.answer}
        command = self._words[0]
        try:
            done = subprocess.run(
                self._words,
                input=json.dumps(request).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self._seconds,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise UsageError(
                f"the check {command} took longer than {self._seconds:g} s for one answer"
            ) from error
        except OSError as error:
            raise UsageError(f"the check {command} cannot be run: {error.strerror}") from error
        if done.returncode < 0 or done.returncode > 125:
            raise UsageError(
                f"the check {command} crashed (exit status {done.returncode}); it should end with "
                "0 for a right answer and 1 for a wrong one"
            )
        return done.returncode == 0

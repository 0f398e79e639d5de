"""How many small Python functions does the sub-network for Python get right, and the dense model?

Ten questions, answered greedily; the first function of each answer is run on examples, in a process
of its own. **That runs what the model wrote.** The last line is the result as JSON.

    python benchmarks/small_functions.py --model smollm2-135m
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

import mlx.nn as nn  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.chat.conversation import Conversation  # noqa: E402
from ifp_mlx.chat.sampling import SamplingOptions  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402

TASK = "help me write Python"
MAX_NEW_TOKENS = 160
TIMEOUT_S = 20
# What to write, and (arguments, results that are right).
FUNCTIONS: tuple[tuple[str, list[tuple[tuple[Any, ...], tuple[Any, ...]]]], ...] = (
    ("returns the n-th Fibonacci number", [((1,), (1,)), ((7,), (13, 21))]),
    ("adds two numbers", [((2, 3), (5,))]),
    ("reverses a string", [(("abc",), ("cba",))]),
    ("checks whether a number is even", [((4,), (True,)), ((3,), (False,))]),
    ("returns the largest number in a list", [(([1, 5, 2],), (5,))]),
    ("counts the vowels in a string", [(("hello",), (2,))]),
    ("computes the factorial of n", [((5,), (120,))]),
    ("checks whether a word is a palindrome", [(("level",), (True,)), (("ab",), (False,))]),
    ("returns the sum of a list of numbers", [(([1, 2, 3],), (6,))]),
    ("removes duplicates from a list", [(([1, 1, 2],), ([1, 2],))]),
)


def function_of(answer: str) -> tuple[str, str] | None:
    """Return the name and the source of an answer's first function, with its imports."""
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = fenced[1] if fenced else answer
    start = re.search(r"^def (\w+)\(", code, re.MULTILINE)
    if start is None:
        return None
    imports = re.findall(r"^(?:import|from) .*", code, re.MULTILINE)
    body = re.split(r"\n(?=\S)", code[start.start() :])[0]  # up to the next line at the margin
    return start[1], "\n".join([*imports, body])


def is_right(answer: str, examples: list[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> bool:
    """Return whether the function gives one of the right results for each example."""
    found = function_of(answer)
    if found is None:
        return False
    name, source = found
    checks = [f"assert {name}(*{given!r}) in {right!r}" for given, right in examples]
    program = "\n".join([source, *checks])
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-c", program], capture_output=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def main() -> None:
    """Ask, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep-units", type=int, default=None)
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model))
    kept = arguments.keep_units or assistant.default_num_kept_units
    models: dict[str, nn.Module] = {
        f"{assistant.files.selector}, K = {kept}": assistant.subnetwork_for_task(TASK, kept).model,
        "dense": assistant.dense().model,
    }
    results: dict[str, dict[str, bool]] = {name: {} for name in models}
    for name, model in models.items():
        for wanted, examples in FUNCTIONS:
            conversation = Conversation(model, assistant.tokenizer, assistant.context_length)
            question = {"role": "user", "content": f"Write a Python function that {wanted}."}
            pieces = conversation.reply([question], SamplingOptions(max_new_tokens=MAX_NEW_TOKENS))
            results[name][wanted] = is_right("".join(pieces), examples)
    print(f"| a function that | {' | '.join(models)} |")
    print(f"|---{'|---' * len(models)}|")
    for wanted, _ in FUNCTIONS:
        marks = ["right" if right[wanted] else "wrong" for right in results.values()]
        print(f"| {wanted} | {' | '.join(marks)} |")
    totals = [f"{sum(right.values())} of {len(FUNCTIONS)}" for right in results.values()]
    print(f"| all | {' | '.join(totals)} |")
    print(json.dumps({**machine(), "num_kept_units": kept, "results": results}))


if __name__ == "__main__":
    main()

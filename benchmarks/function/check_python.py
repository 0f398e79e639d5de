r"""A check for ``ifp fit``: is the function that a model wrote right?

    python check_python.py DATA/function/mbpp.jsonl --examples 20 > python20.jsonl
    ifp fit --task "write Python functions" --examples python20.jsonl \
        --check "python check_python.py DATA/function/mbpp.jsonl"

**Runs what the model wrote**, in a process of its own with limits; that is no sandbox.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from judges import CodeJudge

REQUEST = "Complete this function. Answer with its code alone, without the docstring.\n\n"
LONGEST = 280
"""Characters of the functions' heads that are given as examples: short ones are read sooner."""


def main() -> None:
    """Print examples, or judge the answer on standard input and exit with 0 if it is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--examples", type=int, help="print so many and end")
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.tests.read_text("utf-8").splitlines()]
    if arguments.examples is not None:
        short = [record for record in records if len(record["prompt"]) < LONGEST]
        for record in random.Random(0).sample(short, arguments.examples):
            print(json.dumps({"prompt": REQUEST + record["prompt"].rstrip()}))
        return
    request = json.load(sys.stdin)
    asked = request["prompt"].removeprefix(REQUEST)
    record = next(record for record in records if record["prompt"].rstrip() == asked)
    judge = CodeJudge(record["prompt"], record["entry_point"], record["test"])
    sys.exit(0 if judge.verdict(request["answer"]) == 1 else 1)


if __name__ == "__main__":
    main()

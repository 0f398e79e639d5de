"""Print answers of a run with what their judges say: for looking at, not for figures.

    python show.py OUT KEY --models FOLDER --data FOLDER [--limit N]

KEY is that of a row in OUT/rows.jsonl: ``model|row|set``.
"""

import argparse
import json
from pathlib import Path

from prompts import answer_text
from results import Results
from rows import Row, Unit
from sets import Data, build_set

from ifp_mlx.storage.tokenizer import load_tokenizer


def main() -> None:
    """Print what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("key")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4)
    arguments = parser.parse_args()
    model, row, set_name = arguments.key.split("|")
    tokenizer = load_tokenizer(arguments.models / model)
    items = build_set(set_name, Data(arguments.data), tokenizer).items
    answers = Results(arguments.out).load_answers(Unit(model, Row(row), set_name, 0, 0, None))
    lines = (arguments.out / "rows.jsonl").read_text("utf-8").splitlines()
    line = next(found for found in map(json.loads, lines) if found["key"] == arguments.key)
    for item, written in list(zip(items, answers, strict=False))[: arguments.limit]:
        for number, (turn, ids) in enumerate(zip(item.turns, written, strict=True), start=1):
            name = item.name if len(item.turns) == 1 else f"{item.name}/{number}"
            print(f"=== {name}: {line['outcomes'].get(name)} ({len(ids)} tokens)")
            print(f"--- asked: ...{turn.messages[-1].content[-300:]}")
            print(f"--- wanted: {turn.reference}")
            print(f"--- wrote: {answer_text(ids, tokenizer)}\n")


if __name__ == "__main__":
    main()

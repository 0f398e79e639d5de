"""Several conversations at once: are a sub-network's answers slower than the whole model's?

    python benchmarks/server_conversations.py --model qwen-coder \
        --output benchmarks/results/server-conversations.json

One ``ifp serve`` answers all conversations of a round together, by the whole model
(``MODEL:dense``) and by one task (the bare name, with ``--default-task``), in turns. Each
conversation has two turns; speeds are tokens of all answers a second, prompts included. Memory is
the most that the server ever had resident, after the whole model's first round and at the end.
"""

import argparse
import concurrent.futures
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import openai
from server_load import start_server

from ifp_mlx.benchmarking.timing import machine

TURNS = ("Write a function that {}.", "Now add a docstring and a test.")
SUBJECTS = (
    "counts the vowels of a string",
    "reverses a list",
    "tells whether a number is prime",
    "merges two sorted lists",
    "parses a date such as 2026-11-26",
    "removes duplicates and keeps the order",
)


def conversation(client: openai.OpenAI, model: str, subject: str, max_tokens: int) -> int:
    """Hold one conversation and return how many tokens were answered."""
    messages: list[Any] = []
    answered = 0
    for turn in TURNS:
        messages.append({"role": "user", "content": turn.format(subject)})
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=max_tokens, temperature=0
        )
        assert answer.usage is not None
        answered += answer.usage.completion_tokens
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return answered


def tokens_per_s(client: openai.OpenAI, model: str, max_tokens: int) -> float:
    """Hold all conversations at once."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(SUBJECTS)) as pool:
        futures = [pool.submit(conversation, client, model, s, max_tokens) for s in SUBJECTS]
        answered = sum(future.result() for future in futures)
    return answered / (time.perf_counter() - start)


def most_resident_bytes(pid: int) -> int:
    """Return the peak resident memory of a process. Linux only."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) * 1024


def main() -> None:
    """Measure and print, and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="qwen-coder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--output", "-o", type=Path)
    arguments = parser.parse_args()
    flags = ["--default-task", "python-helper"]
    server, address = start_server(arguments.model, flags)
    try:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        names = {"whole": f"{arguments.model}:dense", "task": arguments.model}
        speeds: dict[str, list[float]] = {who: [] for who in names}
        resident: dict[str, int] = {}
        for number in range(arguments.rounds):
            for who, name in names.items() if number % 2 == 0 else reversed(names.items()):
                speeds[who].append(tokens_per_s(client, name, arguments.max_tokens))
                resident.setdefault(who, most_resident_bytes(server.pid))
                print(f"{who}: {speeds[who][-1]:.2f} tokens a second", flush=True)
        ratios = [task / whole for whole, task in zip(speeds["whole"], speeds["task"], strict=True)]
        result = {
            "benchmark": "server-conversations",
            "machine": machine(),
            "model": arguments.model,
            "conversations": len(SUBJECTS),
            "max_tokens": arguments.max_tokens,
            "tokens_per_s": speeds,
            "task_to_whole": statistics.median(ratios),
            "resident_bytes_whole": resident["whole"],
            "resident_bytes": most_resident_bytes(server.pid),
        }
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

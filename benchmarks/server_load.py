"""Many clients at once against ``ifp serve``: nothing lost, nothing mixed, memory flat?

Starts a server of its own, asks every question once alone, then lets the clients ask them again in
random order, streamed and whole, and compares each answer with the one given alone. Prints what was
answered, every error by kind, latency, and the server's resident memory over time; the last line is
one JSON object.

    python benchmarks/server_load.py --model smollm2-135m --clients 32 --seconds 60

A busy server may refuse with 429 or 503; those are counted apart. Anything else that is not the
expected answer makes the exit code 1.
"""

import argparse
import collections
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from typing import Any

import openai

TASKS = {"python-helper": "help me write Python", "mail": "write friendly e-mails"}
FREE_TASK = "explain history to children"
QUESTIONS = (
    "Write a function that adds two numbers.",
    "Thank my aunt for the scarf.",
    "Who built the pyramids, and why?",
    "Say hello.",
    "List three uses of a dictionary in Python, with an example of each.",
    "Invite a colleague to lunch on Friday.",
)
REFUSALS = (429, 503)
Question = tuple[str, str | None, str]  # model, task, text


def main() -> int:
    """Run the load and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--serve-flags", default="", help="further flags of ifp serve")
    args = parser.parse_args()
    server, url = start_server(args.model, args.serve_flags.split())
    try:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            name = client.models.list().data[0].id
            expected = {q: ask(client, q, args.max_tokens, False) for q in questions(name)}
        outcome = Load(url, expected, args.max_tokens)
        memory = outcome.run(args.clients, args.seconds, server.pid)
    finally:
        server.terminate()
        exit_code = server.wait(60)
    record = {
        "model": args.model,
        "clients": args.clients,
        "seconds": args.seconds,
        "max_tokens": args.max_tokens,
        "outcomes": dict(outcome.counts),
        "requests_per_s": round(len(outcome.latencies_s) / outcome.elapsed_s, 2),
        "latency_p50_s": percentile(outcome.latencies_s, 0.5),
        "latency_p95_s": percentile(outcome.latencies_s, 0.95),
        "rss_mb": [round(value / 1e6, 1) for value in memory],
        "server_exit_code": exit_code,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("ifp-mlx", "mlx", "mlx-lm", "openai")},
    }
    report(record)
    bad = set(outcome.counts) - {"right", *(f"HTTP {status}" for status in REFUSALS)}
    return 1 if bad or exit_code else 0


def questions(name: str) -> list[Question]:
    """Return what clients ask: two named tasks, a task in the request, the dense model."""
    models = [(f"{name}:{task}", None) for task in (*TASKS, "dense")] + [(name, FREE_TASK)]
    return [(model, task, text) for text in QUESTIONS for model, task in models]


def start_server(model: str, flags: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start ``ifp serve`` on a free port; return the process and its address."""
    tasks = [part for name, text in TASKS.items() for part in ("--task", f"{name}={text}")]
    command = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--model", model, "--port", "0", *tasks, *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"on (http://\S+)", line):
            return process, found[1]
    raise SystemExit("the server did not start")


def ask(client: openai.OpenAI, question: Question, max_tokens: int, streamed: bool) -> str:
    """Return the answer to one question."""
    model, task, text = question
    options: Any = {"extra_body": {"task": task}} if task else {}
    answer: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=max_tokens,
        stream=streamed,
        **options,
    )
    if not streamed:
        return str(answer.choices[0].message.content)
    chunks = list(answer)
    if chunks[-1].choices[0].finish_reason is None:
        raise ConnectionError("the stream ended without a reason")
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


class Load:
    """Clients that ask until the time is up.

    Attributes:
        counts: outcomes by kind: ``right``, ``wrong``, ``HTTP 429``, the name of an exception.
        latencies_s: of the requests that were answered.
        elapsed_s: until the last answer; none is begun when the time is up.
    """

    def __init__(self, url: str, expected: dict[Question, str], max_tokens: int):
        self.counts: collections.Counter[str] = collections.Counter()
        self.latencies_s: list[float] = []
        self.elapsed_s = 0.0
        self._url = url
        self._expected = expected
        self._max_tokens = max_tokens
        self._lock = threading.Lock()

    def run(self, num_clients: int, seconds: float, server_pid: int) -> list[int]:
        """Return the server's resident bytes, once a second."""
        start = time.monotonic()
        deadline = start + seconds
        clients = [
            threading.Thread(target=self._be_a_client, args=(number, deadline))
            for number in range(num_clients)
        ]
        for client in clients:
            client.start()
        memory = []
        while time.monotonic() < deadline:
            memory.append(resident_bytes(server_pid))
            time.sleep(1)
        for client in clients:
            client.join()
        self.elapsed_s = time.monotonic() - start
        return memory

    def _be_a_client(self, number: int, deadline: float) -> None:
        chance = random.Random(number)
        with openai.OpenAI(base_url=self._url, api_key="none", max_retries=0) as client:
            while time.monotonic() < deadline:
                question = chance.choice(list(self._expected))
                start = time.monotonic()
                try:
                    answer = ask(client, question, self._max_tokens, chance.random() < 0.5)
                    outcome = "right" if answer == self._expected[question] else "wrong"
                except openai.APIStatusError as error:
                    outcome = f"HTTP {error.status_code}"
                    time.sleep(float(error.response.headers.get("Retry-After", 0)))
                except Exception as error:  # every kind counts
                    outcome = type(error).__name__
                with self._lock:
                    self.counts[outcome] += 1
                    if outcome in ("right", "wrong"):
                        self.latencies_s.append(time.monotonic() - start)


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory, as ps has it on Linux and macOS."""
    output = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return 1024 * int(output.stdout)


def percentile(values: list[float], share: float) -> float | None:
    """Return the value below which a share of all values lies."""
    ordered = sorted(values)
    return round(ordered[int(share * (len(ordered) - 1))], 2) if ordered else None


def report(record: dict[str, Any]) -> None:
    """Print the record for people, then for machines."""
    memory = record["rss_mb"]
    ends = max(1, len(memory) // 6)
    print(f"{record['clients']} clients for {record['seconds']:g} s against {record['model']}")
    for outcome, count in sorted(record["outcomes"].items()):
        print(f"  {outcome:<20}{count:>7}")
    print(f"  requests per second {record['requests_per_s']:>7}")
    print(f"  latency p50, p95    {record['latency_p50_s']} s, {record['latency_p95_s']} s")
    first, last = statistics.mean(memory[:ends]), statistics.mean(memory[-ends:])
    print(f"  resident memory     {first:.1f} MB at first, {last:.1f} MB at last,", end=" ")
    print(f"{max(memory):.1f} MB at most")
    print(f"  exit after SIGTERM  {record['server_exit_code']}")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())

"""Many clients at once against ``ifp serve``: nothing lost, nothing mixed, memory flat?

Starts a server of its own, asks every question once alone, then lets the clients ask them again in
random order. Two named tasks, a task in the request and the whole model answer; half of the answers
are streamed; some must fit a schema, some must call a tool, and some clients leave in the middle.
Each answer is compared with the one given alone. Prints what was answered, every error by kind,
latency, and the server's resident memory over time; the last line is one JSON object.

    python benchmarks/server_load.py --model smollm2-135m --clients 32 --seconds 60
    python benchmarks/server_load.py --random --clients 32 --seconds 60 --strict

A busy server may refuse with 429 or 503; those are counted apart. Anything else that is not the
expected answer makes the exit code 1. Answers made together are computed in another order than
alone: in a model whose weights are packed, a token that was nearly a tie may differ. Such answers
are counted as "close" where they are the beginning of the expected one up to such a token, and
belong to the same question; with --strict they are wrong.
"""

import argparse
import collections
import dataclasses
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai

TASKS = {"python-helper": "help me write Python", "mail": "write friendly e-mails"}
FREE_TASK = "explain history to children"
QUESTIONS = (
    "Write a function that adds two numbers.",
    "Thank my aunt for the scarf.",
    "Who built the pyramids, and why?",
    "Say hello.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["code", "mail", "history"]},
        "tags": {"type": "array", "items": {"enum": ["short", "long"]}, "maxItems": 2},
        "of": {
            "type": "object",
            "properties": {"length": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["length"],
            "additionalProperties": False,
        },
    },
    "required": ["kind", "tags", "of"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "note", "description": "Note what was asked.", "parameters": SCHEMA},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
STRUCTURED_TOKENS = 160  # enough for the schema in the tokens of any model, a byte each included
RANDOM_SHAPE = {  # small enough for a thousand answers a minute on a busy machine
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
REFUSALS = (429, 503)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a client asks.

    Attributes:
        model: the name that answers.
        task: in the request.
        text: of the user.
        kind: ``text``, ``schema`` or ``tool``: what the answer must be.
    """

    model: str
    task: str | None
    text: str
    kind: str

    def options(self, max_tokens: int) -> dict[str, Any]:
        """Return the request without its stream."""
        options: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": max_tokens if self.kind == "text" else STRUCTURED_TOKENS,
        }
        if self.task:
            options["extra_body"] = {"task": self.task}
        if self.kind == "schema":
            options["response_format"] = FORMAT
        if self.kind == "tool":
            options |= {
                "tools": [TOOL],
                "tool_choice": "required",
                "parallel_tool_calls": False,
            }
        return options


def main() -> int:
    """Run the load and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--random", action="store_true", help="serve a small model of random weights in float32"
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--cancel", type=float, default=0.1, help="share of answers left early")
    parser.add_argument("--strict", action="store_true", help="no answer may differ in a token")
    parser.add_argument("--serve-flags", default="", help="further flags of ifp serve")
    parser.add_argument("--output", type=Path, help="write the record to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            import mlx.core as mx
            from synthetic_checkpoint import write_checkpoint

            args.model = str(Path(folder) / "random")
            write_checkpoint(Path(args.model), RANDOM_SHAPE, dtype=mx.float32)
        return run(args)


def run(args: argparse.Namespace) -> int:
    """Start a server, run the load and return the exit code."""
    server, url = start_server(args.model, args.serve_flags.split())
    try:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=900) as client:
            name = client.models.list().data[0].id
            expected = {q: ask(client, q, args.max_tokens, False) for q in questions(name)}
        check_structure(expected)
        outcome = Load(url, expected, args.max_tokens, args.cancel)
        memory = outcome.run(args.clients, args.seconds, server.pid)
    finally:
        server.terminate()
        exit_code = server.wait(120)
    record = {
        "model": Path(args.model).name,
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
        "versions": {
            name: version(name) for name in ("ifp-mlx", "mlx", "mlx-lm", "llguidance", "openai")
        },
    }
    report(record)
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    good = {"right", "cancelled", *(f"HTTP {status}" for status in REFUSALS)}
    bad = set(outcome.counts) - (good if args.strict else good | {"close"})
    return 1 if bad or exit_code else 0


def questions(name: str) -> list[Question]:
    """Return what clients ask: of two named tasks, a task in the request, and the whole model."""
    models = [(f"{name}:{task}", None) for task in (*TASKS, "dense")] + [(name, FREE_TASK)]
    return [
        Question(model, task, text, kind)
        for text, kind in (*((text, "text") for text in QUESTIONS), *STRUCTURED)
        for model, task in models
    ]


STRUCTURED = ((QUESTIONS[0], "schema"), (QUESTIONS[1], "tool"))


def check_structure(expected: dict[Question, str]) -> None:
    """Stop if what must be JSON is not: there would be nothing to compare with."""
    for question, answer in expected.items():
        if question.kind != "text" and not is_structured(answer):
            raise SystemExit(f"{question} got {answer!r}")


def is_structured(answer: str) -> bool:
    """Return whether an answer is an object of the schema."""
    try:
        value = json.loads(answer)
        return value["kind"] in ("code", "mail", "history") and 0 <= value["of"]["length"] <= 9
    except (ValueError, TypeError, KeyError):
        return False


def start_server(model: str, flags: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start ``ifp serve`` on a free port; return the process and its address."""
    tasks = [part for name, text in TASKS.items() for part in ("--task", f"{name}={text}")]
    command = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--model", model, "--port", "0", "--quiet", *tasks, *flags],
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
    """Return the answer to one question; of a call, its arguments."""
    options = question.options(max_tokens)
    answer: Any = client.chat.completions.create(stream=streamed, **options)
    if not streamed:
        message = answer.choices[0].message
        if question.kind == "tool":
            return str(message.tool_calls[0].function.arguments)
        return str(message.content)
    chunks = list(answer)
    if chunks[-1].choices[0].finish_reason is None:
        raise ConnectionError("the stream ended without a reason")
    deltas = [chunk.choices[0].delta for chunk in chunks]
    if question.kind == "tool":
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        return "".join(call.function.arguments for call in calls)
    return "".join(delta.content or "" for delta in deltas)


def leave(client: openai.OpenAI, question: Question, max_tokens: int) -> None:
    """Begin to read an answer, and go away."""
    options = question.options(max_tokens)
    with client.chat.completions.create(stream=True, **options) as stream:
        next(iter(stream))


def compared(question: Question, answer: str, expected: dict[Question, str]) -> str:
    """Return whether an answer is ``right``, ``close`` to it, or ``wrong``."""
    if answer == expected[question]:
        return "right"
    if question.kind != "text":
        return "close" if is_structured(answer) else "wrong"
    begun = len(expected[question]) // 4  # before a near tie, it is the answer to this question
    others = {text for other, text in expected.items() if other != question}
    is_close = answer[:begun] == expected[question][:begun] and answer not in others
    return "close" if is_close else "wrong"


class Load:
    """Clients that ask until the time is up.

    Attributes:
        counts: outcomes by kind: ``right``, ``close``, ``wrong``, ``cancelled``, ``HTTP 429``, the
            name of an exception.
        latencies_s: of the requests that were answered.
        elapsed_s: until the last answer; none is begun when the time is up.
    """

    def __init__(
        self, url: str, expected: dict[Question, str], max_tokens: int, cancelled_share: float
    ):
        self.counts: collections.Counter[str] = collections.Counter()
        self.latencies_s: list[float] = []
        self.elapsed_s = 0.0
        self._url = url
        self._expected = expected
        self._max_tokens = max_tokens
        self._cancelled_share = cancelled_share
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
        with openai.OpenAI(
            base_url=self._url, api_key="none", max_retries=0, timeout=900
        ) as client:
            while time.monotonic() < deadline:
                question = chance.choice(list(self._expected))
                is_left, is_streamed = (
                    chance.random() < self._cancelled_share,
                    chance.random() < 0.5,
                )
                start = time.monotonic()
                try:
                    if is_left:
                        leave(client, question, self._max_tokens)
                        outcome = "cancelled"
                    else:
                        answer = ask(client, question, self._max_tokens, is_streamed)
                        outcome = compared(question, answer, self._expected)
                except openai.APIStatusError as error:
                    outcome = f"HTTP {error.status_code}"
                    time.sleep(float(error.response.headers.get("Retry-After", 0)))
                except Exception as error:  # every kind counts
                    outcome = type(error).__name__
                with self._lock:
                    self.counts[outcome] += 1
                    if outcome in ("right", "close", "wrong"):
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

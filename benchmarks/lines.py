"""Many short prompts: ``ifp generate --lines`` beside a loop of processes and mlx-lm's batches.

    python benchmarks/lines.py [--rounds 3] [-o benchmarks/results/lines.json]

Every figure is whole processes, from start to end, with the same prompts, the same sub-network
(cached and exported first) and as many new tokens. mlx-lm runs ``batch_generate`` on the exported
sub-network, on the terms that ifp gives itself: PyTorch, which neither needs, is hidden where it is
installed, and OpenBLAS is loaded where mlx has no fast BLAS. Of the loop a few processes are timed
and their mean is multiplied. Rounds are interleaved and compared in pairs: whatever else the
machine does meets all of them. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from startup import children_cpu_s

from ifp_mlx.benchmarking.report import markdown_table
from ifp_mlx.convert.registry import resolve_model

TASK = "answer short questions"
NUM_PROMPTS = 200
_QUESTIONS = (
    "What is {n} plus {m}?",
    "Name a word that rhymes with {word}.",
    "Is {word} an animal, a plant or a thing?",
    "Write one sentence about a {word} and the number {n}.",
    "Spell {word} backwards.",
)
_WORDS = ("cat", "rose", "lamp", "river", "stone", "cloud", "horse", "bread")

_BATCH = """
import json, sys
sys.modules["torch"] = None
from ifp_mlx.blas import prefer_openblas
prefer_openblas()
from mlx_lm import batch_generate, load
model, tokenizer = load(sys.argv[1])
prompts = [
    tokenizer.apply_chat_template([{"role": "user", "content": line}], add_generation_prompt=True)
    for line in open(sys.argv[2]).read().splitlines()
]
for text in batch_generate(model, tokenizer, prompts, max_tokens=int(sys.argv[3])).texts:
    print(" ".join(text.split()))
"""


def prompts() -> list[str]:
    """Return short prompts, no two alike."""
    return [
        _QUESTIONS[i % len(_QUESTIONS)].format(n=i, m=3 * i + 7, word=_WORDS[i // 5 % len(_WORDS)])
        for i in range(NUM_PROMPTS)
    ]


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Run a command; return seconds, CPU seconds and what it printed."""
    before_s = children_cpu_s()
    start = time.perf_counter()
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    passed_s = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed: {done.stderr}")
    return passed_s, children_cpu_s() - before_s, done.stdout


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=5, help="of the loop, that are timed")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model, limit = str(resolve_model(args.model)), str(args.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "IFP_HOME": folder, "HF_HUB_OFFLINE": "1"}
        exported, lines = str(Path(folder, "exported")), Path(folder, "prompts.txt")
        lines.write_text("".join(f"{prompt}\n" for prompt in prompts()))
        ifp = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()"]
        ours = ["--model", model, "--task", TASK]
        plain = ["--dequantize", "--dtype", "float32"]  # what both compute in on a CPU
        timed([*ifp, "export", *ours, *plain, "-o", exported], environment)
        together = [*ifp, "generate", *ours, "-m", limit, "--lines", str(lines)]
        batch = [sys.executable, "-c", _BATCH, exported, str(lines), limit]
        rounds: list[tuple[tuple[float, float, str], tuple[float, float, str]]] = []
        loop: list[tuple[float, float, str]] = []
        for number in range(args.rounds):
            rounds.append((timed(together, environment), timed(batch, environment)))
            while len(loop) * args.rounds < args.processes * (number + 1):
                one = [*ifp, "generate", *ours, "-m", limit, prompts()[len(loop)]]
                loop.append(timed(one, environment))
    same = sum(
        a == b
        for a, b in zip(rounds[0][0][2].split("\n"), rounds[0][1][2].split("\n"), strict=True)
    )
    loop_s = NUM_PROMPTS * statistics.mean(process[0] for process in loop)
    loop_cpu_s = NUM_PROMPTS * statistics.mean(process[1] for process in loop)
    figures = {
        "lines_s": [ours[0] for ours, _ in rounds],
        "lines_cpu_s": [ours[1] for ours, _ in rounds],
        "mlx_lm_s": [theirs[0] for _, theirs in rounds],
        "mlx_lm_cpu_s": [theirs[1] for _, theirs in rounds],
        "loop_s": loop_s,
        "loop_cpu_s": loop_cpu_s,
        "ratio_to_mlx_lm": statistics.median(ours[0] / theirs[0] for ours, theirs in rounds),
        "cpu_ratio_to_mlx_lm": statistics.median(ours[1] / theirs[1] for ours, theirs in rounds),
        "times_as_fast_as_loop": loop_s / statistics.median(ours[0] for ours, _ in rounds),
        "same_answers_as_mlx_lm": same - 1,  # the last is the empty line at the end
    }
    median = {
        name: statistics.median(values) for name, values in figures.items() if name.endswith("_s")
        and isinstance(values, list)
    }  # fmt: skip
    rows = [
        ["ifp generate --lines", f"{median['lines_s']:.1f} s", f"{median['lines_cpu_s']:.1f} s"],
        ["mlx_lm batch_generate", f"{median['mlx_lm_s']:.1f} s", f"{median['mlx_lm_cpu_s']:.1f} s"],
        [f"loop ({args.processes} timed)", f"{loop_s:.0f} s", f"{loop_cpu_s:.0f} s"],
    ]
    print(markdown_table(["200 prompts", "time", "CPU time"], rows))
    record = {
        "model": args.model,
        "prompts": NUM_PROMPTS,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "processes": args.processes,
        **figures,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")},
    }
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_generate_prints_only_the_answer_on_stdout(ifp: Run, word_model: Path, words: str) -> None:
    outcome = ifp("generate", "hello", "--model", word_model, "--keep", "0.67")
    assert outcome.code == 0
    assert outcome.stdout == f"{words}\n"
    assert "selected 128 of 192 FFN units for this prompt" in outcome.stderr


def test_generate_equals_mlx_lm_when_everything_is_kept(
    ifp: Run, small_model: Path, prompts: list[str]
) -> None:
    from mlx_lm import generate, load

    model, tokenizer = load(str(small_model))[:2]
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expected = generate(model, tokenizer, ids, max_tokens=24)
        outcome = ifp(
            "generate", prompt, "--model", small_model, "--keep", "1.0", "--temp", "0",
            "--max-tokens", "24",
        )  # fmt: skip
        assert outcome.stdout == f"{expected}\n"


def test_generate_penalizes_repetition_as_mlx_lm_does(
    ifp: Run, small_model: Path, prompts: list[str]
) -> None:
    from mlx_lm import generate, load
    from mlx_lm.sample_utils import make_logits_processors

    model, tokenizer = load(str(small_model))[:2]
    for prompt in prompts[:3]:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        processors = make_logits_processors(repetition_penalty=1.3)
        expected = generate(model, tokenizer, ids, max_tokens=24, logits_processors=processors)
        arguments = ("generate", prompt, "--model", small_model, "--dense", "-m", "24")
        assert ifp(*arguments, "--repetition-penalty", "1.3").stdout == f"{expected}\n"
        plain = ifp(*arguments).stdout
        assert plain != f"{expected}\n"
        assert ifp(*arguments, "--repetition-penalty", "1").stdout == plain


def test_generate_joins_prompt_and_piped_text(
    ifp: Run, word_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ifp_mlx.chat.conversation import Conversation

    asked: list[str] = []

    def reply(self: Conversation, messages: Any, *_: object) -> Any:
        asked.extend(message["content"] for message in messages)
        yield "ok"

    monkeypatch.setattr(Conversation, "reply", reply)
    ifp("generate", "explain", "-", "--model", word_model, stdin="def f(): ...\n")
    ifp("generate", "-", "--model", word_model, stdin="only this\n")
    ifp("generate", "--model", word_model, stdin="piped alone\n")
    ifp("generate", "no pipe", "--model", word_model)
    ifp("generate", "no", "quotes", "--model", word_model)
    assert asked == [
        "explain\n\ndef f(): ...",
        "only this",
        "piped alone",
        "no pipe",
        "no quotes",
    ]


def test_generate_leaves_a_loop_its_standard_input(word_model: Path, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"the next line of the loop\n")
    os.close(write_end)
    program = "from ifp_mlx.cli.app import main; main()"
    command = [sys.executable, "-c", program, "generate", "hello", "--model", str(word_model)]
    done = subprocess.run(
        [*command, "-m", "3"],
        stdin=read_end,
        capture_output=True,
        text=True,
        env={**os.environ, "IFP_HOME": str(tmp_path)},
    )
    assert done.returncode == 0
    assert "a - after the prompt adds it" in done.stderr
    assert os.read(read_end, 100) == b"the next line of the loop\n"
    os.close(read_end)


def test_generate_stats_name_every_measurement(ifp: Run, word_model: Path) -> None:
    arguments = ("generate", "hello", "--model", word_model, "--task", "say words")
    outcome = ifp(*arguments, "--stats", "--keep", "0.67")
    for part in (
        "128/192 FFN units",
        "parameters active",
        "selection",
        "slicing",
        "tokens/s",
        "peak",
    ):
        assert part in outcome.stderr
    assert "tokens/s" not in outcome.stdout


def test_generate_json_has_answer_and_statistics(ifp: Run, word_model: Path, words: str) -> None:
    outcome = ifp("generate", "hello", "--model", word_model, "--json", "--keep-units", "64")
    record = json.loads(outcome.stdout)
    assert record["answer"] == words
    assert record["num_kept_units"] == 64
    assert record["num_units"] == 192
    assert record["active_parameters"] < record["total_parameters"]
    assert record["finish_reason"] == "stop"
    assert {"selection_ms", "slicing_ms", "prompt_tps", "generation_tps"} <= record.keys()


def test_generate_says_what_keep_was_rounded_to(ifp: Run, word_model: Path) -> None:
    outcome = ifp("generate", "hello", "--model", word_model, "--keep", "0.5")
    rounded = "--keep 0.5 is 128 of 192 FFN units (0.667), the nearest that can be kept"
    assert rounded in outcome.stderr
    exact = ifp("generate", "hello", "--model", word_model, "--keep", "1")
    assert "nearest" not in exact.stderr


def test_generate_dense_uses_every_unit(ifp: Run, word_model: Path) -> None:
    outcome = ifp("generate", "hello", "--model", word_model, "--dense", "--json")
    record = json.loads(outcome.stdout)
    assert (record["selector"], record["num_kept_units"]) == ("dense", 192)


def test_generate_second_run_of_a_task_is_a_cache_hit(ifp: Run, word_model: Path) -> None:
    arguments = ("generate", "hello", "--model", word_model, "--task", "say words", "--json",
                 "--keep", "0.5")  # fmt: skip
    first, second = ifp(*arguments), ifp(*arguments)
    assert not json.loads(first.stdout)["from_cache"]
    assert json.loads(second.stdout)["from_cache"]
    assert json.loads(second.stdout)["selection_ms"] == 0
    assert 'cache hit for "say words"' in second.stderr
    assert json.loads(first.stdout)["answer"] == json.loads(second.stdout)["answer"]


def test_generate_no_cache_leaves_no_cache(ifp: Run, word_model: Path, tmp_path: Path) -> None:
    ifp("generate", "hello", "--model", word_model, "--task", "say words", "--no-cache")
    assert not (tmp_path / "home" / "subnets").exists()


def test_generate_raw_continues_the_text(ifp: Run, word_model: Path) -> None:
    outcome = ifp("generate", "Alpha bravo", "--model", word_model, "--raw", "-m", "3")
    assert outcome.stdout == "**charlie**\n"


@pytest.mark.parametrize(
    ("arguments", "selector"),
    [([], "dense"), (["--keep-units", "64"], "prompt"), (["--selector", "random"], "random")],
)
def test_generate_without_a_task_selects_only_where_it_pays(
    ifp: Run, tiny_checkpoint: Callable[..., Path], arguments: list[str], selector: str
) -> None:
    model = tiny_checkpoint(intermediate_size=1280)
    outcome = ifp("generate", "hello", "--model", model, "-m", "3", "--json", *arguments)
    record = json.loads(outcome.stdout)
    assert record["selector"] == selector
    assert record["prompt_too_short"] == (selector == "dense")
    told = "to select a part for this prompt would take longer than it saves"
    assert (told in outcome.stderr) == (selector == "dense")


def test_generate_seed_makes_sampling_repeatable(ifp: Run, small_model: Path) -> None:
    def answer(seed: int) -> str:
        arguments = ("--model", small_model, "--temp", "1.5", "--seed", str(seed), "-m", "20")
        return str(ifp("generate", "hello", *arguments).stdout)

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--keep-units", "0"], 2, "--keep-units must be between 64 and 192 FFN units, not 0"),
        (["--keep-units", "256"], 2, "--keep-units must be between 64 and 192 FFN units, not 256"),
        (["--keep-units", "100"], 2, "nearest to 100: 64 or 128"),
        (["--keep", "0"], 2, "--keep must be above 0"),
        (["--keep", "1.5"], 2, "--keep must be above 0 and at most 1"),
        (["--repetition-penalty", "0"], 2, "--repetition-penalty must be a number above 0, not 0"),
        (["--repetition-penalty", "-1"], 2, "must be a number above 0, not -1"),
        (["--repetition-penalty", "nan"], 2, "must be a number above 0, not nan"),
        (["--selector", "magic"], 2, "no selector 'magic'"),
        (["--selector", "static"], 2, "needs a calibration"),
        (["--selector", "predictor"], 2, "needs an IFP adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_bad_amounts_and_selectors(
    ifp: Run, word_model: Path, arguments: list[str], code: int, part: str
) -> None:
    outcome = ifp("generate", "hello", "--model", word_model, *arguments)
    assert outcome.code == code
    assert outcome.stdout == ""
    assert part in outcome.stderr.splitlines()[-1]
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("stdin", "part"),
    [
        (b"caf\xe9 au lait", "not UTF-8 text (byte 3)"),
        (b"", "the prompt is empty"),
        (b" \n\n", "the prompt is empty"),
    ],
    ids=["latin-1", "nothing", "blank"],
)
def test_generate_refuses_bad_stdin(ifp: Run, word_model: Path, stdin: bytes, part: str) -> None:
    outcome = ifp("generate", "-", "--model", word_model, stdin=stdin)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert part in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_generate_refuses_an_empty_prompt(ifp: Run, word_model: Path) -> None:
    outcome = ifp("generate", "  ", "--model", word_model)
    assert (outcome.code, outcome.stderr) == (2, "ifp: the prompt is empty\n")


def test_generate_refuses_a_prompt_longer_than_the_context(ifp: Run, word_model: Path) -> None:
    outcome = ifp("generate", "x" * 20_000, "--model", word_model, "--dense")
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "the model's context 4096; shorten it" in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("smollm2-135m", "run: ifp pull smollm2-135m"),
        ("nothing", "there is no model 'nothing'"),
    ],
)
def test_generate_says_how_to_get_a_missing_model(ifp: Run, name: str, part: str) -> None:
    outcome = ifp("generate", "hello", "--model", name)
    assert outcome.code == 1
    assert part in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_generate_interrupted_keeps_the_partial_answer(endless_model: Path, tmp_path: Path) -> None:
    program = "from ifp_mlx.cli.app import main; main()"
    command = [sys.executable, "-c", program, "generate", "hello"]
    process = subprocess.Popen(
        [*command, "--model", str(endless_model), "--max-tokens", "100000", "--stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        bufsize=0,
        env={**os.environ, "IFP_HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    begun = process.stdout.read(20)  # blocks until the answer is under way
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (begun + rest).decode().startswith("Alpha bravo **charlie** ")
    assert b"interrupted" in errors
    assert b"Traceback" not in errors

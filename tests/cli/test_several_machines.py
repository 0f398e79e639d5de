"""Two processes that ``mlx.launch`` would start give the tokens of one; one of them speaks."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

IFP = "import sys; from ifp_mlx.cli.app import main; sys.exit(main())"
# What docs/experts.md gives to mlx.launch for an exported sub-network: mlx-lm alone.
MLX_LM = """
import sys
import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.utils import sharded_load

group = mx.distributed.init()
model, tokenizer = sharded_load(sys.argv[1], tensor_group=group)
answer = "".join(r.text for r in stream_generate(model, tokenizer, "hello", max_tokens=16))
if group.rank() == 0:
    print(group.size(), answer)
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(program: str, *arguments: object, size: int, folder: Path) -> list[tuple[str, str]]:
    """Return what each of so many processes says on stdout and on stderr."""
    hosts = [[f"127.0.0.1:{_free_port()}"] for _ in range(size)]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    processes = []
    for rank in range(size):
        environment = os.environ | {"IFP_HOME": str(folder / "home"), "PYTHONWARNINGS": "ignore"}
        if size > 1:
            environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, errors="replace", env=environment,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "amount", "temperature"),
    [("qwen3_moe", ("--keep-experts", 4), 0), ("llama", ("--keep-units", 128), 0.7)],
)
def test_two_machines_give_the_tokens_of_one(
    write_tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    amount: tuple[str, int],
    temperature: float,
) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", family)
    arguments = (
        "generate", "hello", "--task", "write", *amount, "-m", 16, "--model", model,
        "--temp", temperature, "--seed", 3,
    )  # fmt: skip
    ((alone, _),) = launch(IFP, *arguments, size=1, folder=tmp_path)
    (first, status), (second, errors) = launch(IFP, *arguments, size=2, folder=tmp_path)
    assert first == alone
    assert len(alone) > 10
    assert "cache hit" in status
    assert not second
    assert not errors


@pytest.mark.slow
def test_an_export_runs_on_two_machines_in_mlx_lm(
    ifp: Run, write_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    exported = tmp_path / "exported"
    arguments = ("--task", "write", "--keep-experts", "4", "--model", model, "-o", exported)
    assert ifp("export", *arguments).code == 0
    ((alone, _),) = launch(MLX_LM, exported, size=1, folder=tmp_path)
    (first, _), (second, _) = launch(MLX_LM, exported, size=2, folder=tmp_path)
    assert (alone[0], first[0]) == ("1", "2")
    assert first[1:] == alone[1:]
    assert not second


def test_a_family_that_mlx_lm_does_not_spread_is_refused(
    ifp: Run, write_tiny_checkpoint: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import mlx.core as mx

    model = write_tiny_checkpoint(tmp_path / "model", "olmoe")
    alone = mx.distributed.init()
    monkeypatch.setattr("ifp_mlx.assistant.several_machines", lambda: alone)
    outcome = ifp("generate", "hello", "--task", "write", "--keep", "0.5", "--model", model)
    assert outcome.code == 1
    assert "mlx-lm spreads no olmoe models over several machines" in outcome.stderr


@pytest.mark.parametrize("command", [("chat",), ("serve", "--task", "a=b")])
def test_what_listens_runs_on_one_machine(
    ifp: Run, word_model: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    outcome = ifp(*command, "--model", word_model)
    assert outcome.code == 2
    assert f"ifp {command[0]} runs on one machine; write the sub-network with ifp export" in (
        outcome.stderr
    )

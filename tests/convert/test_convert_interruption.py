"""SIGKILL at any moment leaves the target absent or complete, and the rerun succeeds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert.mixtures import one_tensor_an_expert

Factory = Callable[..., Path]
KILLS = 4  # of each operation

# Runs in a process of its own: imports once, never computes, and forks a child for each attempt.
PROGRAM = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

import mlx.core as mx
import mlx_lm.convert
import mlx_lm.utils
import transformers

from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.export import export_checkpoint
from ifp_mlx.convert.model_card import ModelCard
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.unit_file import UNIT_FILE, unit_file_is_current, write_unit_file

checkpoint, gguf, mixture, made = map(Path, sys.argv[1:5])
num_kills = int(sys.argv[5])
load_tokenizer(checkpoint)  # computes nothing, and imports what children would import
SOURCES = {
    "convert": checkpoint, "convert gguf": gguf, "quantize": checkpoint, "export": checkpoint,
    "prepare": checkpoint, "convert mixture": mixture, "export mixture": mixture,
}


def work(force):
    if operation.startswith("convert"):
        convert_checkpoint(source, target, overwrite=force)
    elif operation == "quantize":
        quantize_checkpoint(
            source, target, make_quantization(bits=4, group_size=32), overwrite=force
        )
    elif operation.startswith("export"):
        model = load_model(source)[0]
        num_kept = 4 if source == mixture else 64
        selection = select_random(model, num_kept)
        card = ModelCard(None, None, "x", "random", num_kept, 192, 3, "units", 1, 2)
        compact = slice_model(model, selection)
        export_checkpoint(compact, selection, source, target, card, overwrite=force)
    else:
        write_unit_file(source)


def is_complete(force):
    if operation == "prepare":
        return (source / UNIT_FILE).exists() and unit_file_is_current(source)
    load_tokenizer(target)
    return load_model(target)[0] is not None


def in_child(function, force=False):
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if function(force) is not False else 1
        finally:
            os._exit(code)
    return child


def ends_well(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


reports = {}
for operation, source in SOURCES.items():
    target = made / operation.replace(" ", "-") / "target"
    place = source / UNIT_FILE if operation == "prepare" else target
    rng = random.Random(operation)
    start = time.monotonic()
    assert ends_well(in_child(work)), operation
    duration = time.monotonic() - start
    states = []
    for kill in range(num_kills):
        force = kill % 2 == 1  # every other time there is an old target to replace
        if not force and place.exists():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        child = in_child(work, force)
        time.sleep(rng.random() * duration)
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        present = place.exists()
        states.append([killed, present, present and ends_well(in_child(is_complete))])
    assert ends_well(in_child(work, True)), "the rerun of " + operation
    assert ends_well(in_child(is_complete)), "what the rerun made: " + operation
    reports[operation] = {"states": states, "left": [p.name for p in place.parent.iterdir()]}
print(json.dumps(reports))
"""


@pytest.mark.slow
def test_killed_work_leaves_nothing_or_everything(
    tiny_checkpoint: Factory, tiny_gguf: Factory, tmp_path: Path
) -> None:
    mixture = one_tensor_an_expert(tiny_checkpoint("qwen3_moe", "mixture"))
    sources = (tiny_checkpoint(), tiny_gguf(), mixture)
    arguments = [*map(str, sources), str(tmp_path / "made"), str(KILLS)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout.splitlines()[-1])
    assert reports.keys() == {
        "convert", "convert gguf", "quantize", "export", "prepare", "convert mixture",
        "export mixture",
    }  # fmt: skip
    for operation, report in reports.items():
        killed, present, complete = zip(*report["states"], strict=True)
        assert any(killed), operation
        assert present == complete, operation
        # The rerun has swept away what the killed runs left; a lock file may stay.
        left = [name for name in report["left"] if name.startswith((".target", ".units."))]
        assert set(left) <= {".units.lock"}, operation

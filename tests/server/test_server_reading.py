"""A server whose sub-networks only read: prompts go through the part, answers through the whole."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.subnet_provider import EngineOptions

Serve = Callable[..., contextlib.AbstractContextManager[Any]]
TASK = "help me write Python"
NUM_KEPT_UNITS = 64


@pytest.mark.parametrize("prompt", ["hi", "tell me about every one of your functions, please " * 4])
def test_a_part_reads_what_clients_ask(
    checkpoint_folder: Path, serve: Serve, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = Assistant.load(checkpoint_folder, reads_with_part=True)
    subnet = assistant.subnetwork_for_task(TASK, NUM_KEPT_UNITS)
    messages: Any = [{"role": "user", "content": prompt}]
    sampling = SamplingOptions(max_new_tokens=16)
    expected = "".join(assistant.converse(subnet).reply(messages, sampling))

    read: list[int] = []
    answer = ReadsWithPart.__call__

    def counted(self: ReadsWithPart, inputs: Any, cache: Any = None, **options: Any) -> Any:
        read.append(max(0, inputs.shape[1] - self.tail_tokens))
        return answer(self, inputs, cache, **options)

    monkeypatch.setattr(ReadsWithPart, "__call__", counted)
    engine = Engine(
        lambda: (
            Assistant.load(checkpoint_folder, reads_with_part=True),
            lambda task: NUM_KEPT_UNITS,
        ),
        EngineOptions(),
    )
    try:
        with serve(engine) as running:
            reply = running.client().chat.completions.create(
                model="tiny:python-helper", messages=messages
            )
    finally:
        engine.stop()
    assert reply.choices[0].message.content == expected
    assert (sum(read) > 0) == (len(prompt) > 100)  # a short prompt is all tail

"""A server of a tiny model with two tasks, on a free port of the loopback."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.server.access import Access
from ifp_mlx.server.catalog import ModelCatalog
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.http import Limits, Server
from ifp_mlx.server.page_files import page_files
from ifp_mlx.server.request_log import RequestLog
from ifp_mlx.server.requests import RequestDefaults
from ifp_mlx.server.subnet_provider import EngineOptions
from ifp_mlx.storage.weights import load_model

NUM_KEPT_UNITS = 64
TASKS = {"python-helper": "help me write Python", "mail": "write friendly e-mails to my aunt"}
DEFAULT_LIMITS = Limits()
OPEN = Access()


@dataclasses.dataclass
class Running:
    """A server that answers, and what it was made of."""

    server: Server
    log: list[str]
    clients: contextlib.ExitStack

    def line_with(self, text: str) -> str:
        """Return the log's line with some text; it is written after the answer."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for line in list(self.log):
                if text in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {self.log}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/v1"

    def client(self, api_key: str = "none") -> openai.OpenAI:
        client = openai.OpenAI(base_url=self.url, api_key=api_key, max_retries=0, timeout=60)
        return self.clients.enter_context(client)


@pytest.fixture(scope="module")
def checkpoint_folder(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_checkpoint: Callable[..., Path]
) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "ifp").mkdir()
    model, _ = load_model(folder)
    examples = [CalibrationExample(range(9, 60), "code"), CalibrationExample(range(60, 99), "talk")]
    calibrate(model, examples).save(folder / "ifp" / "calibration.safetensors")
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Path) -> Iterator[Engine]:
    engine = Engine(
        lambda: (Assistant.load(checkpoint_folder), lambda task: NUM_KEPT_UNITS),
        EngineOptions(),
    )
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def serve() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """Return a context manager: an engine, limits, who may use it -> a running server."""

    @contextlib.contextmanager
    def run(
        engine: Any,
        limits: Limits = DEFAULT_LIMITS,
        access: Access = OPEN,
        *,
        base_name: str = "tiny",
        tasks: Mapping[str, str] = TASKS,
        **catalog: Any,
    ) -> Iterator[Running]:
        log: list[str] = []
        server = Server(
            "127.0.0.1",
            0,
            engine=engine,
            catalog=ModelCatalog(base_name, tasks, **catalog),
            defaults=RequestDefaults(max_tokens=16, temperature=0.0),
            limits=limits,
            access=access,
            log=RequestLog(log.append),
            files=page_files(),
        )
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            with contextlib.ExitStack() as clients:
                yield Running(server, log, clients)
        finally:
            server.drain(20)
            server.shutdown()
            thread.join()
            server.server_close()

    return run


@pytest.fixture(scope="module")
def running(
    engine: Engine, serve: Callable[..., contextlib.AbstractContextManager[Running]]
) -> Iterator[Running]:
    with serve(engine) as running:
        yield running


@pytest.fixture(scope="module")
def expected(checkpoint_folder: Path) -> Callable[..., str]:
    """Return an oracle: task or None for dense, a message -> the answer, without any server."""
    assistant = Assistant.load(checkpoint_folder)

    def answer(task: str | None, text: str, max_tokens: int = 16, **options: Any) -> str:
        subnet = assistant.dense()
        if task is not None:
            subnet = assistant.subnetwork_for_task(task, NUM_KEPT_UNITS)
        sampling = SamplingOptions(max_tokens, **options)
        messages = [{"role": "user", "content": text}]
        return "".join(assistant.converse(subnet).reply(messages, sampling))

    return answer

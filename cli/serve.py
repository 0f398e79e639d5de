"""``ifp serve``: an OpenAI-compatible server for one model and its tasks."""

from __future__ import annotations

import dataclasses
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.help_sections import ADVANCED
from ifp_mlx.cli.loading import describe_subnetwork, load_assistant, num_kept_units
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.presets import amount_of, find_preset
from ifp_mlx.cli.terminal import plural, refuse_several_machines, say, working
from ifp_mlx.errors import ResourceError, UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.server.access import Access
    from ifp_mlx.server.http import Limits, Server
    from ifp_mlx.server.subnet_provider import EngineOptions, Prepared

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class ServedAssistantOptions(options.AssistantOptions):
    """What the assistant is made of: its tasks have names, so each has a sub-network of its own."""

    reuse: options.Reuse = 0.0


@dataclasses.dataclass(frozen=True)
class AddressOptions:
    """Where the server is, and who may use it."""

    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one."
        ),
    ] = 8080
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="IFP_API_KEY",
            metavar="KEY",
            help="Clients must send this key as a bearer token. In the environment it stays out of "
            "the list of processes.",
        ),
    ] = None

    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origins",
            metavar="ORIGIN",
            help="Web pages from here, such as https://example.org, may use the server; * allows "
            "every page. May be given several times.",
        ),
    ] = None
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-hosts",
            metavar="NAME",
            help="Another name that the server is reached by, such as that of a reverse proxy; * "
            "allows every name. May be given several times.",
            rich_help_panel=ADVANCED,
        ),
    ] = None

    @property
    def access(self) -> Access:
        """The library's form."""
        from ifp_mlx.server.access import Access

        origins, hosts = self.allowed_origins or (), self.allowed_hosts or ()
        return Access(self.api_key or None, tuple(origins), tuple(host.lower() for host in hosts))

    @property
    def shown_host(self) -> str:
        """The address as a URL has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def page_host(self) -> str:
        """The address that a browser on this machine finds the server at."""
        return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.shown_host)


@dataclasses.dataclass(frozen=True)
class DefaultAnswerOptions:
    """How a request is answered that does not say how."""

    max_tokens: options.MaxTokens = 512
    temp: options.Temp = 0.0


@dataclasses.dataclass(frozen=True)
class EngineFlags:
    """How answers are made together."""

    decode_concurrency: Annotated[
        int,
        typer.Option(
            "--decode-concurrency",
            metavar="N",
            min=1,
            help="Answers of one sub-network that are made together.",
            rich_help_panel=ADVANCED,
        ),
    ] = 8
    prompt_cache_bytes: Annotated[
        int,
        typer.Option(
            "--prompt-cache-bytes",
            metavar="N",
            min=0,
            help="Memory for what earlier requests have read (KV caches).",
            rich_help_panel=ADVANCED,
        ),
    ] = 10**9

    prompt_cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache-dir",
            metavar="FOLDER",
            help="Keep the KV caches here when the server stops, in as much space as "
            "--prompt-cache-bytes allows, so that conversations go on quickly after a restart.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    resident_bytes: Annotated[
        int,
        typer.Option(
            "--resident-bytes",
            metavar="N",
            min=0,
            help="Memory for the sub-networks that are not in use now; the oldest go.",
            rich_help_panel=ADVANCED,
        ),
    ] = 2 * 10**9
    keep_alive: Annotated[
        float | None,
        typer.Option(
            "--keep-alive",
            metavar="SECONDS",
            min=0.1,
            help="Free the model's memory after this long without a request; the next request "
            "loads it again. Without it the model stays.",
            rich_help_panel=ADVANCED,
        ),
    ] = None

    @property
    def options(self) -> EngineOptions:
        """The library's form."""
        from ifp_mlx.server.subnet_provider import EngineOptions

        together = self.decode_concurrency
        return EngineOptions(
            together,
            together,
            prompt_cache_bytes=self.prompt_cache_bytes,
            prompt_cache_folder=self.prompt_cache_dir,
            keep_alive_s=self.keep_alive,
        )


@dataclasses.dataclass(frozen=True)
class LimitFlags:
    """What requests may take."""

    max_requests: Annotated[
        int,
        typer.Option(
            "--max-requests",
            metavar="N",
            min=1,
            help="Requests in work and waiting; one more is refused with 429.",
            rich_help_panel=ADVANCED,
        ),
    ] = 64
    max_body_bytes: Annotated[
        int,
        typer.Option(
            "--max-body-bytes",
            metavar="N",
            min=1,
            help="Largest request body.",
            rich_help_panel=ADVANCED,
        ),
    ] = 2**20
    time_limit: Annotated[
        float,
        typer.Option(
            "--time-limit",
            metavar="SECONDS",
            min=0.1,
            help="Longest time for one answer, waiting included; then 503 or 504.",
            rich_help_panel=ADVANCED,
        ),
    ] = 300.0

    @property
    def limits(self) -> Limits:
        """The library's form."""
        from ifp_mlx.server.http import Limits

        return Limits(self.max_body_bytes, self.max_requests, self.time_limit)


@expands_options
def serve(
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="NAME=SENTENCE",
            help="Serve a task as the model MODEL:NAME, or a task that ifp task save knows by "
            "this name. May be given several times.",
        ),
    ] = None,
    default_task: Annotated[
        str | None,
        typer.Option(
            "--default-task",
            metavar="NAME",
            help="The task that the bare MODEL answers with. Without it the whole model answers.",
        ),
    ] = None,
    task_from_system: Annotated[
        bool,
        typer.Option(
            "--task-from-system",
            help="Take the system message of a request for the bare MODEL as its task.",
        ),
    ] = False,
    *,
    amount: options.Amount,
    assistant_options: ServedAssistantOptions,
    address: AddressOptions,
    answers: DefaultAnswerOptions,
    engine_flags: EngineFlags,
    limit_flags: LimitFlags,
    open_page: Annotated[
        bool,
        typer.Option("--open", help="Open the server's page in a browser: a chat, and pictures."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose/--quiet",
            help="Print one line about each request on standard error, or only about those that "
            "the server could not answer.",
        ),
    ] = True,
) -> None:
    """Serve a model and its tasks to programs that speak OpenAI's API.

    Each task is a model of its own (MODEL:NAME). The bare MODEL answers with every unit, as
    MODEL:dense does, unless a request has a "task" field or --default-task names a task.

    Example: ifp serve --task python-helper="help me write Python" --task mail="write e-mails"
    """
    refuse_several_machines("serve")
    tasks, amounts = parse_tasks(task or []), {}
    for preset in filter(None, map(find_preset, task or [])):
        amounts[preset.task] = amount_of(preset)

    from ifp_mlx.convert.registry import resolve_model
    from ifp_mlx.server.catalog import ModelCatalog, SubnetRequest
    from ifp_mlx.server.engine import Engine
    from ifp_mlx.server.http import Server
    from ifp_mlx.server.page_files import page_files
    from ifp_mlx.server.request_log import RequestLog
    from ifp_mlx.server.requests import RequestDefaults
    from ifp_mlx.server.seen_subnets import SeenSubnets

    catalog = ModelCatalog(
        resolve_model(assistant_options.source.model).name,
        tasks,
        default_task=default_task,
        task_from_system=task_from_system,
    )
    access = address.access
    seen = SeenSubnets()

    def prepare() -> Prepared:
        assistant = load_assistant(assistant_options)
        assistant.limit_resident_bytes(engine_flags.resident_bytes)
        given = num_kept_units(assistant, amount) if amount.is_given else None

        def kept_units(task: str) -> int:
            own = amounts.get(task, amount)
            return num_kept_units(assistant, own, task) if given is None else given

        for name, description in tasks.items():  # now, so that no request waits for it
            with working(f"selecting for {name}"):
                subnet = assistant.subnetwork_for_task(description, kept_units(description))
            seen.add(SubnetRequest("task", description), subnet)
            say(f"{catalog.base_name}:{name}: {describe_subnetwork(subnet)}")
        return assistant, kept_units

    engine = Engine(prepare, engine_flags.options, seen)
    try:
        server = Server(
            address.host,
            address.port,
            engine=engine,
            catalog=catalog,
            defaults=RequestDefaults(answers.max_tokens, answers.temp),
            limits=limit_flags.limits,
            access=access,
            log=RequestLog(say, only_server_errors=not verbose),
            files=page_files(),
        )
        if address.host not in _LOOPBACK and not address.api_key:
            say(f"anyone who reaches {address.host} can use this server; --api-key asks for a key")
        names = ", ".join(catalog.names)
        say(f"serving {names} on http://{address.shown_host}:{server.port}/v1")
        page = f"http://{address.page_host}:{server.port}/"
        say(f"the page is {page}")
        _run(server, page if open_page else None)
    finally:
        engine.stop()


def parse_tasks(values: list[str]) -> dict[str, str]:
    """Return name -> description for ``NAME=SENTENCE`` options, and for names of presets.

    Raises:
        UsageError: no '=', or a name twice.
    """
    tasks: dict[str, str] = {}
    for value in values:
        name, equals, description = value.partition("=")
        if not equals and (preset := find_preset(name)) is not None:
            description = preset.task
        elif not equals:
            raise UsageError(f'--task needs a name here: --task NAME="{value}"')
        if name in tasks:
            raise UsageError(f"--task {name} is given twice; each task needs a name of its own")
        tasks[name] = description
    return tasks


def _run(server: Server, page: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is in work; a second signal does not wait.

    Args:
        server: listens already.
        page: what to open in a browser, if anything.
    """
    stop = threading.Event()
    hurry = threading.Event()

    def on_signal(signal_number: int, frame: object) -> None:
        (hurry if stop.is_set() else stop).set()

    former = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    if page is not None:
        import webbrowser

        if not webbrowser.open(page):
            say(f"no browser was found; open {page} in one")
    try:
        while server.engine.is_healthy and not stop.wait(0.2):
            pass
        if server.num_requests:
            say(f"finishing {plural(server.num_requests, 'request')}; again to stop at once")
        deadline_s = server.limits.time_limit_s
        while not hurry.is_set() and deadline_s > 0 and not server.drain(0.2):
            deadline_s -= 0.2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for number, handler in former.items():
            signal.signal(number, handler)
    if not server.engine.is_healthy:
        raise ResourceError("the generation thread has died; what it said is above")

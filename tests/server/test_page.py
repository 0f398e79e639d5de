"""The page, as somebody uses it: in Chromium, against a server of a tiny model."""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.server.access import Access
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.replies import Answers
from ifp_mlx.server.subnet_provider import EngineOptions

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

Page = Any
Running = Any
Serve = Callable[..., contextlib.AbstractContextManager[Running]]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=2</script>'
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium if it is there, else the system's."""
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        path = str(own) if own.exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip(
                "no Chromium here: apt-get install chromium, or playwright install chromium"
            )
        # Chromium's own sandbox does not work for root, who runs these tests in containers.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Page]]:
    """Return a function: a running server -> its page; what goes wrong in it fails the test."""
    problems: list[str] = []
    with contextlib.ExitStack() as contexts:

        def open_page(
            running: Running, *, width: int = 1000, expects: str = "", **look: Any
        ) -> Page:
            size = {"width": width, "height": 800}
            context = contexts.enter_context(
                contextlib.closing(browser.new_context(viewport=size, **look))
            )
            page = context.new_page()
            page.set_default_timeout(15_000)

            def note(text: str) -> None:
                if not (expects and re.search(expects, text)):
                    problems.append(text)

            page.on("pageerror", lambda error: note(str(error)))
            page.on("console", lambda m: note(m.text) if m.type in ("error", "warning") else None)
            page.on("dialog", lambda dialog: note(f"a dialog: {dialog.message}"))
            page.goto(f"http://127.0.0.1:{running.server.port}/")
            return page

        yield open_page
    assert problems == []


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def last_answer(page: Page) -> Any:
    return page.locator("article.assistant .body").last


def done(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("done", timeout=15_000)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pieces of answers come slowly."""
    pieces = Answers.pieces

    def slowly(self: Answers, *arguments: Any) -> Iterator[Any]:
        for piece in pieces(self, *arguments):
            yield piece
            time.sleep(0.15)

    monkeypatch.setattr(Answers, "pieces", slowly)


def test_a_conversation(visit: Any, running: Running, expected: Callable[..., str]) -> None:
    page = visit(running)
    expect(page.get_by_role("heading", name="tiny", exact=True)).to_be_visible()
    first = expected("help me write Python", "hello")
    ask(page, "hello")
    done(page)
    assert "".join(last_answer(page).inner_text().split()) == "".join(first.split())
    expect(page.locator("article .facts")).to_contain_text(re.compile(r"16 tokens · first after"))
    expect(last_answer(page)).not_to_have_attribute("aria-busy", "true")
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data) if r.method == "POST" else None)
    ask(page, "and then")
    expect(page.locator("article.assistant")).to_have_count(2)
    done(page)
    sent = json.loads(bodies[0])
    assert sent["model"] == "tiny:python-helper"
    assert [message["content"] for message in sent["messages"]] == ["hello", first, "and then"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_comes_in_pieces_and_can_be_stopped(
    visit: Any, running: Running, how: str
) -> None:
    page = visit(running)
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    running.log.clear()
    ask(page, "tell me everything")
    expect(last_answer(page)).to_have_attribute("aria-busy", "true")
    expect(last_answer(page)).not_to_be_empty()
    if how == "button":
        stop.click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("stopped")
    expect(page.locator("article .facts")).to_have_text("stopped")
    expect(stop).to_be_disabled()
    running.line_with("POST /v1/chat/completions 499")  # the server stopped, too
    assert last_answer(page).inner_text()
    assert not page.get_by_role("alert").filter(has_text=re.compile(".")).count()


def test_another_task_answers_when_it_is_chosen(
    visit: Any, running: Running, expected: Callable[..., str]
) -> None:
    page = visit(running)
    group = page.get_by_role("group", name="What answers")
    expect(group.get_by_role("radio")).to_have_count(3)
    expect(group.get_by_role("radio", name="python-helper")).to_be_checked()
    group.get_by_role("radio", name="python-helper").focus()
    page.keyboard.press("ArrowDown")
    expect(group.get_by_role("radio", name="mail")).to_be_checked()
    expect(page.locator("#memory dt")).to_have_text(["whole model", "mail"])
    for name, description in (("mail", "write friendly e-mails to my aunt"), ("whole", None)):
        group.get_by_role("radio", name=name).check()
        page.get_by_role("button", name="New conversation").click()
        ask(page, "hello")
        done(page)
        answer = expected(description, "hello")
        assert "".join(last_answer(page).inner_text().split()) == "".join(answer.split())
    for name in ("mail", "whole"):
        expect(group.get_by_role("radio", name=name)).to_have_accessible_name(
            re.compile(r"\d+\s[MG]B.*\d+\stokens/s")
        )


def test_a_task_can_be_described(
    visit: Any, running: Running, expected: Callable[..., str]
) -> None:
    page = visit(running, expects="400")
    page.get_by_label("Another task").fill("bake a cake")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("radio", name="bake a cake")).to_be_checked()
    expect(page.locator("#status")).to_have_text("bake a cake answers now")
    expect(page.locator("#overlaps tbody tr")).to_have_count(3)
    expect(page.get_by_role("img", name=re.compile("bake a cake: 64 of 192"))).to_be_visible()
    ask(page, "hello")
    done(page)
    answer = expected("bake a cake", "hello")
    assert "".join(last_answer(page).inner_text().split()) == "".join(answer.split())
    page.get_by_label("Another task").fill("word " * 300)
    page.get_by_role("button", name="Add").click()
    expect(page.locator("#status")).to_contain_text("shorten it")
    expect(page.get_by_role("radio", name=re.compile("word word"))).to_have_count(0)
    expect(page.get_by_role("radio", name="bake a cake")).to_be_checked()


def test_the_picture_follows_the_task_and_what_it_is_compared_with(
    visit: Any, running: Running
) -> None:
    page = visit(running)
    picture = page.locator("#picture")
    alone = "python-helper: 64 of 192 FFN units in each of 3 layers"
    expect(picture).to_have_attribute("alt", alone)
    assert picture.evaluate("image => image.naturalWidth") >= 280
    first = picture.get_attribute("src")
    shown = page.get_by_label("Show")
    expect(shown.get_by_role("option")).to_have_text(["its scores", "what it shares with mail"])
    shown.select_option("what it shares with mail")
    expect(picture).to_have_attribute("alt", re.compile("are also kept for mail"))
    assert picture.get_attribute("src") != first
    page.get_by_text("Layer by layer").click()
    expect(page.locator("#layers tr")).to_have_count(3)
    expect(page.locator("#layers-head th")).to_have_text(["layer", "kept", "in common", "share"])
    page.get_by_role("radio", name="mail").check()
    expect(picture).to_have_attribute("alt", alone.replace("python-helper", "mail"))
    expect(page.locator("#overlaps td").filter(has_text=re.compile(r"^1\.00$"))).to_have_count(2)
    page.get_by_role("radio", name="whole").check()
    expect(picture).to_be_hidden()
    expect(shown).to_be_hidden()
    expect(page.locator("figcaption")).to_contain_text("Every unit runs")


def test_experts_light_up_as_tokens_are_routed(
    visit: Any,
    serve: Serve,
    write_tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    slow: None,
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "mixture", "qwen3_moe")
    engine = Engine(lambda: (Assistant.load(folder), lambda task: 6), EngineOptions())
    try:
        with serve(engine) as running:
            page = visit(running)
            options = page.get_by_label("Show").get_by_role("option")
            expect(options.first).to_have_text("where its tokens go")
            expect(page.locator("#picture")).to_have_attribute("alt", re.compile("6 of 8 experts"))
            drawn: list[str] = []

            def keep(route: Any) -> None:
                response = route.fetch()
                drawn.append(response.text())
                route.fulfill(response=response)

            page.route(re.compile("routed=1"), keep)
            page.reload()
            page.wait_for_load_state("networkidle")
            ask(page, "go")  # fifteen tokens: more than two seconds
            expect(page.locator("#status")).to_have_text("writing…")
            with page.expect_response(re.compile("routed=1")):
                pass
            expect(page.locator("#status")).to_have_text("writing…")
            done(page)
            page.wait_for_load_state("networkidle")
            assert "more of the latest tokens" not in drawn[0]
            assert "more of the latest tokens" in drawn[-1]
            page.unroute_all(behavior="ignoreErrors")
            page.close()  # it must not ask while the server stops
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def hostile(checkpoint_folder: Path, serve: Serve) -> Iterator[Running]:
    """A server whose model and tasks have names that would be markup."""
    engine = Engine(lambda: (Assistant.load(checkpoint_folder), lambda task: 64), EngineOptions())
    tasks = {"mail": HOSTILE, "other": "../../etc/passwd\"'`${document.title=3}"}
    with serve(engine, base_name=HOSTILE, tasks=tasks) as running:
        yield running
    engine.stop()


def test_names_and_answers_never_become_markup(visit: Any, hostile: Running) -> None:
    page = visit(hostile, expects="400")
    ours = {tag: page.locator(tag).count() for tag in ("img", "script", "iframe", "a", "svg")}
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    expect(page.locator("#task-list")).to_contain_text(HOSTILE)
    title = page.title()
    deltas = [HOSTILE[:20], HOSTILE[20:], f"\n```\n{HOSTILE}\n```\n", "[x](javascript:alert(1))"]
    events = [{"choices": [{"index": 0, "delta": {"content": delta}}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {"reasoning_content": HOSTILE}}]})
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route(
        "**/chat/completions",
        lambda route: route.fulfill(body=stream, content_type="text/event-stream"),
    )
    ask(page, HOSTILE)
    done(page)
    for place in (
        last_answer(page),
        page.locator("article.assistant pre"),
        page.locator("article.assistant .thought"),
        page.locator("article.user"),
    ):
        expect(place).to_contain_text(HOSTILE)
    page.unroute("**/chat/completions")
    page.route(
        "**/chat/completions",
        lambda route: route.fulfill(status=400, json={"error": {"message": HOSTILE}}),
    )
    ask(page, "again")
    expect(page.get_by_role("alert").filter(has_text="onerror")).to_have_text(HOSTILE)
    page.get_by_label("Another task").fill(HOSTILE)
    page.get_by_role("button", name="Add").click()
    expect(page.locator("#status")).to_have_text(f"{HOSTILE} answers now")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile(re.escape(HOSTILE)))
    page.get_by_label("Show").select_option("what it shares with other")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile("are also kept for other"))
    assert {tag: page.locator(tag).count() for tag in ours} == ours
    assert page.title() == title


def test_markup_that_came_in_would_still_not_run(visit: Any, running: Running) -> None:
    page = visit(running, expects="Content Security Policy|ERR_|Failed to load")
    expect(page.locator("#picture")).to_be_visible()  # what comes later sets no title
    page.evaluate(
        """html => {
            document.body.insertAdjacentHTML("beforeend", html);
            const script = document.createElement("script");
            script.textContent = "document.title = 'ran'";
            document.body.append(script);
        }""",
        HOSTILE,
    )
    page.wait_for_timeout(200)
    assert page.title() == "tiny · ifp"
    refused = page.evaluate(
        """() => new Promise(resolve => {
            const refused = "securitypolicyviolation";
            document.addEventListener(refused, event => resolve(event.effectiveDirective));
            fetch("http://localhost:9/").catch(() => setTimeout(resolve, 500, "nothing"));
        })"""
    )
    assert refused == "connect-src"


def test_nothing_is_asked_of_others(visit: Any, running: Running, browser: Any) -> None:
    page = visit(running)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.locator("#picture")).to_be_visible()
    ask(page, "hello")
    done(page)
    own = (
        f"http://127.0.0.1:{running.server.port}/",
        f"blob:http://127.0.0.1:{running.server.port}/",
    )
    assert len(asked) > 8
    assert [url for url in asked if not url.startswith(own)] == []


def test_everything_can_be_reached_with_the_keyboard(visit: Any, running: Running) -> None:
    page = visit(running)
    expect(page.locator("#picture")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    page.locator(".skip").focus()
    reached = []
    while (focused := page.locator(":focus")).count():
        reached.append(focused.evaluate("e => e.id || e.name || e.className || e.parentElement.id"))
        shown = focused.evaluate(
            """e => [e, e.closest("label")].some(
                one => one && getComputedStyle(one).outlineStyle === "solid")"""
        )
        assert shown, f"no focus is seen on {reached[-1]}"
        page.keyboard.press("Tab")
    order = ["skip", "task", "description", "messages", "prompt", "send", "anew", "shown"]
    assert [name for name in reached if name in order] == order
    assert reached[-2:] == ["by-layer", "scroll"]  # and then the browser's own
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .body")).to_have_text("one\ntwo")
    done(page)


def test_a_screen_reader_finds_its_way(visit: Any, running: Running) -> None:
    page = visit(running)
    expect(page.locator("#picture")).to_be_visible()
    for role, name in (
        ("banner", None), ("main", None), ("log", "Conversation"), ("status", None),
        ("region", "Tasks"), ("region", "Conversation"), ("region", "What runs"),
        ("group", "What answers"), ("textbox", "Your message"), ("combobox", "Show"),
        ("table", "Tasks against tasks"), ("link", "Skip to your message"),
    ):  # fmt: skip
        found = page.get_by_role(role, **({} if name is None else {"name": name, "exact": True}))
        expect(found.first).to_be_attached()
    assert page.locator("html").get_attribute("lang") == "en"
    names = page.locator("#overlaps thead th").evaluate_all("e => e.map(c => c.ariaLabel)")
    assert names == ["python-helper", "mail"]
    unnamed = page.locator("button, input, select, textarea, img").evaluate_all(
        """all => all.filter(e => !(e.labels?.length || e.textContent.trim() || e.alt
            || e.ariaLabel)).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_with_a_key_the_page_asks_for_it(visit: Any, engine: Any, serve: Serve) -> None:
    with serve(engine, access=Access("sesame")) as running:
        page = visit(running, expects="401")
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        expect(dialog).to_be_visible()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("wrong; send it as")
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#picture")).to_be_visible()
        ask(page, "hello")
        done(page)
        page.reload()  # the tab keeps it
        expect(page.locator("#picture")).to_be_visible()
        assert "sesame" not in page.content()


def test_what_is_refused_is_said_and_can_be_sent_again(visit: Any, running: Running) -> None:
    page = visit(running, expects="400")
    long = "word " * 300
    ask(page, long)
    expect(page.locator("article.assistant .problem")).to_contain_text("shorten it")
    expect(page.locator("#prompt")).to_have_value(long.strip())
    ask(page, "hello")
    done(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 700, 1000, 1400])
def test_it_fits_every_width_in_light_and_dark(
    visit: Any, running: Running, width: int, scheme: str
) -> None:
    page = visit(running, width=width, color_scheme=scheme)
    expect(page.locator("#picture")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.locator("main *:visible").evaluate_all(
        f"all => all.filter(e => e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)"
    )
    assert outside == []
    ground, text = page.evaluate(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    )
    darker, lighter = (ground, text) if scheme == "dark" else (text, ground)
    assert _lightness(darker) < 60 < 200 < _lightness(lighter)
    picture = page.locator("#picture").screenshot()
    assert (
        _first_pixel_lightness(picture) > 200
        if scheme == "light"
        else (_first_pixel_lightness(picture) < 60)
    )


def _lightness(colour: str) -> float:
    channels = [int(number) for number in re.findall(r"\d+", colour)[:3]]
    return sum(channels) / 3


def _first_pixel_lightness(png: bytes) -> float:
    """Return how light the ground of a picture is, some pixels from its corner."""
    import io

    from matplotlib.image import imread

    pixels = imread(io.BytesIO(png), format="png")
    return float(pixels[6, pixels.shape[1] // 2, :3].mean() * 255)

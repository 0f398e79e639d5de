"""Draw docs/page-*.png: the server's page with the default model, light and dark, wide and narrow.

ifp pull smollm2-135m && python docs/make_page_screenshots.py

Needs Playwright and a Chromium, as the page's tests do.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from ifp_mlx.convert.registry import resolve_model

FOLDER = Path(__file__).parent
TASKS = {
    "python": "help me write Python",
    "mail": "write friendly e-mails",
    "history": "explain history to children",
}
QUESTION = "Write a Python function that adds two numbers."
SIZES = {1400: 900, 400: 860}
TIMEOUT_MS = 600_000


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serve the default model with three tasks; yield the page's address."""
    model = resolve_model("smollm2-135m").absolute()
    command = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()", "serve"]
    tasks = [f"--task={name}={description}" for name, description in TASKS.items()]
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        (Path(home) / "models" / model.name).symlink_to(model)
        environment = {**os.environ, "IFP_HOME": home}
        process = subprocess.Popen(
            [*command, "--port=0", "--max-tokens=160", *tasks],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            yield next(found[1] for line in lines if (found := re.search(r"page is (\S+)", line)))
        finally:
            process.terminate()
            process.communicate()


def converse(page: Any) -> None:
    """Ask, change the task, and ask again."""
    for task, text in (("python", QUESTION), ("history", "Who was Cleopatra?")):
        page.get_by_role("radio", name=task).check()
        page.get_by_label("Your message").fill(text)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("done", timeout=TIMEOUT_MS)
    page.get_by_role("radio", name="python").check()
    page.get_by_label("Show").select_option("what it shares with history")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile("also kept for history"))
    page.wait_for_load_state("networkidle")


def save(png: bytes, path: Path) -> None:
    """Write a picture with a palette, which takes half as much."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    """Draw each size in light and in dark, of the same conversation."""
    browsers = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, browsers)), None)
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with serving() as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=flags)
        for width, height in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            converse(page)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.wait_for_timeout(300)
                png = page.screenshot(full_page=True)
                save(png, FOLDER / f"page-{width}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()

"""view.py over runs with hostile names, and a page in a browser that fails its test for anything odd."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.support import ROOT, data_config
from tests.utils.record.test_curves import line
from tests.utils.record.test_run_index import make_run, said
from utils.io.files import read_json, write_json

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def runs(folder):
    for number, name in enumerate(("a", HOSTILE.replace("/", ""), "c")):
        rows = '{"kind": "train", "loss": 1.0}\n'  # without its step
        rows += "".join(line(step, loss=1 / step, **{HOSTILE: 1.0}) for step in range(1, 30))
        rows += line(10, "evaluate", loss=0.5, top1=0.25 * number)
        run = make_run(folder / name, f"WARNING {HOSTILE}\n", metrics_jsonl=rows, progress_json=said("running", 29))
        (run / "tables").mkdir()
        (run / "tables/tags.csv").write_text(f"tag,f1\n{HOSTILE},0.5\n" + "".join(f"t{i},{i}\n" for i in range(5_000)))
        save_grey(run / f"plots/{HOSTILE.replace('/', '')}.png")
    return folder


def add_data(run, **data):
    """Let a run be trained on a collection; data: of `data_config`."""
    file = run / "config.json"
    write_json(file, read_json(file) | {"data": data_config(**data).model_dump(mode="json")})
    return run


@contextmanager
def serve(*words):
    """Start view.py with a storage of its own; yields the address that it prints. Its terminal has no traceback."""
    command = [sys.executable, "view.py", "view.open=false", "view.port=18080", *words]
    # NiceGUI behaves otherwise in a test of pytest.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    with TemporaryDirectory() as storage:
        own["NICEGUI_STORAGE_PATH"] = storage
        log = Path(storage, "log")
        process = subprocess.Popen(command, cwd=ROOT, env=own, stderr=log.open("w"))
        try:
            while not (address := re.search(r"http://[^/]+:(\d+)/", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            for _ in range(100):  # the address is printed a moment before the port is bound
                with suppress(OSError), socket.create_connection(("127.0.0.1", int(address[1]))):
                    break
                time.sleep(0.1)
            yield address[0].rstrip("/")
        finally:
            process.terminate()
            process.wait()
        assert not re.search("Traceback|token=a", log.read_text())


@pytest.fixture(scope="module")
def words(runs):
    return [f"runs={runs}"]


@pytest.fixture(scope="module")
def address(words):
    with serve(*words) as address:
        yield address


def save_grey(file, level=90, size=(30, 20)):
    """Write an image of one grey, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(file)


def sees(page, *texts):
    for text in texts:
        page.get_by_text(text).first.wait_for()


def press(page, key):
    """Press a key of /label or /review when the picture that it is for is drawn."""
    page.wait_for_function("document.querySelector('.stage[data-drawn=true]')", timeout=240_000)
    page.keyboard.press(key)


PROSE = """() => {
  const page = document.querySelector(".nicegui-content").cloneNode(true)
  page.querySelectorAll("code, .mono, .lines").forEach(command => command.remove())
  return page.textContent
}"""


def assert_plain(page):
    """The page, but for commands and logs, names no key of the configuration."""
    assert not re.search(r"\b(augment|data|loop|model|optim|runtime|task)\.[a-z]", page.evaluate(PROSE))


def assert_fits(page):
    """Nothing is wider than the window, on a phone and on a desk."""
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
        keep_screen(page, width)


def keep_screen(page, kind):
    """Write what the window shows, to be looked at."""
    name = "_".join(re.findall(r"\w+", page.title()))[:60]
    page.screenshot(path=ROOT / f"outputs/screens/{name}_{kind}.png")


def draw_for_docs(page, name, width=1440, height=900, scheme="light"):
    """Write a picture of docs/images: `make screens` copies it from outputs/screens."""
    before = page.viewport_size
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(300)
    page.screenshot(path=ROOT / f"outputs/screens/{name}.png")
    page.set_viewport_size(before)


def assert_accessible(page):
    """axe-core finds nothing in what the page shows now, light or dark, and at most one button is filled."""
    assert page.locator(".main").count() <= 1
    if "tab=Settings" not in page.url:
        assert_plain(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(100)
        keep_screen(page, scheme)
        found = Axe().run(page)
        assert not found.violations_count, f"{scheme}: {found.generate_report()}"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        yield browser
        browser.close()


# Colours and dialogs change at once.
STILL = """localStorage.name ??= "Eve"
addEventListener("DOMContentLoaded", () => {
  const style = document.createElement("style")
  style.textContent = "* { transition-duration: 0s !important; animation-duration: 0s !important }"
  document.head.append(style)
})"""


@pytest.fixture
def page(browser, address):
    """A page that fails the test for a message in its console, a dialog, or a request to another host."""
    context, wrong = browser.new_context(viewport={"width": 1280, "height": 900}), []
    context.add_init_script(STILL)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}") or dialog.dismiss())
    local = (address, address.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []


# Clicks and keys that reach the page; a click that a key makes, such as Enter on a button, or a label, is none.
COUNT = """for (const kind of ["click", "keydown"])
  addEventListener(kind, event => (kind == "keydown" || event.detail) && event.isTrusted && event.target.type != "file"
    && localStorage.setItem(kind, 1 + +(localStorage[kind] ?? 0)), true)"""


@pytest.fixture
def walker(page, request):
    """A page that says with pytest -s how many clicks, keys and seconds a walk took. Its sliders begin lower."""

    def shorten(route):
        answer = route.fetch()
        text = answer.text().replace("steps: [1,", "steps: [0.2,").replace("sides: [512,", "sides: [128,")
        route.fulfill(response=answer, body=text)

    page.add_init_script(COUNT)
    page.route("**/plans*", shorten)
    page.set_default_timeout(300_000)  # of a training beside other work
    started = time.monotonic()
    yield page
    counts = page.evaluate("`${localStorage.click} clicks, ${localStorage.keydown} keys`")
    print(f"\n{request.node.name}: {counts}, {time.monotonic() - started:.0f} seconds")

"""view.py over runs with hostile names, and a page in a browser that fails its test for anything odd."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.support import ROOT
from tests.utils.record.test_curves import line
from tests.utils.record.test_run_index import make_run, said

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("a", HOSTILE.replace("/", ""), "c")):
        rows = "".join(line(step, loss=1 / step, **{HOSTILE: 1.0}) for step in range(1, 30))
        rows += line(10, "evaluate", loss=0.5, top1=0.25 * number)
        run = make_run(folder / name, f"WARNING {HOSTILE}\n", metrics_jsonl=rows, progress_json=said("running", 29))
        (run / "tables").mkdir()
        (run / "tables/tags.csv").write_text(f"tag,f1\n{HOSTILE},0.5\n" + "".join(f"t{i},{i}\n" for i in range(5_000)))
        (run / "plots").mkdir()
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(run / f"plots/{HOSTILE.replace('/', '')}.png")
    return folder


def serve(*words):
    """Start view.py; return the process and the address that it prints."""
    command = [sys.executable, "view.py", "view.open=false", *words]
    # NiceGUI behaves otherwise in a test of pytest.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    process = subprocess.Popen(command, cwd=ROOT, env=own, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    address = None
    while address is None and (text := process.stderr.readline()):
        address = re.search(r"http://\S+", text)
    assert address, "view.py has ended"
    port = int(re.search(r":(\d+)/", address[0])[1])
    for _ in range(100):  # the address is printed a moment before the port is bound
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    return process, address[0]


@pytest.fixture(scope="module")
def address(runs):
    process, address = serve(f"runs={runs}", "view.port=18080")
    yield address.rstrip("/")
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page that fails the test for a message in its console, a dialog, or a request to another host."""
    context, wrong = browser.new_context(viewport={"width": 1280, "height": 900}), []
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}") or dialog.dismiss())
    local = (address, address.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []

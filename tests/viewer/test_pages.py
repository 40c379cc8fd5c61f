"""The pages of view.py in a browser: nothing from elsewhere, no errors, hostile text as text, live."""

import urllib.error
import urllib.request

import pytest

from tests.in_process import run
from tests.support import make_collection, refuses
from tests.utils.record.test_curves import line
from tests.viewer.conftest import add_data, assert_accessible, assert_fits, sees, serve
from tests.viewer.test_review import write_table
from tests.viewer.test_samples import write_samples
from utils.record.run_index import RunIndex
from viewer import app
from viewer.images import Shelf
from viewer.run import TABS

LONG = "a" * 5_000
# Of each page: what is there when it is drawn.
PAGES = {
    "/": "text=Drop pictures here", "/start?folder={root}": ".plan-outlook", "/runs": "td a", "/try": "text=No image",
    "/compare?run=0/a&run=0/c": "canvas", "/samples?run=0/lora": ".samples img", "/collection/{name}": ".tile img",
    "/collection/{name}?image=3": ".look img", "/map?collection={name}": "[aria-label*=map] canvas",
    "/label?collection={name}": ".stage[data-drawn=true]", "/review?run=0/a": ".stage[data-drawn=true]",
    "/label?collection={name}&field=tags": ".stage[data-drawn=true]", "/run/0/a": "canvas",
    "/run/0/lora?tab=Mistakes": "[aria-selected=true]:has-text('Overview')",  # it has none
    **{f"/run/0/a?tab={tab}": ".q-tab-panel > :not(.q-spinner)" for tab in TABS if tab != "Overview"},
}  # fmt: skip


@pytest.fixture(scope="module")
def words(runs):
    """A run on a collection, of which it has some images wrong, and one with pictures of prompts."""
    root = make_collection(runs / "images")
    add_data(runs / "a", root=str(root))
    write_samples(runs)
    rows = {"path": ["train/A/000.png"], "label": ["A"], "prediction": ["B"], "wrong": [True], "loss": [1.0]}
    write_table(runs / "a", root, probability=[0.5], **rows)
    return [f"runs={runs}", f"data.root={root}"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_accessible_plain_and_as_wide_as_the_window(page, address, runs, path):
    name = Shelf(RunIndex([runs]), None).of_run(runs / "a")
    page.goto(address + path.format(root=runs / "images", name=name))
    page.locator(PAGES[path]).first.wait_for()
    assert page.locator("img[onerror]").count() == 0
    assert_fits(page)
    assert_accessible(page)


def test_all_pages_are_in_the_list():
    addresses = [address.partition("{")[0] for each in app._PAGES for address in each.addresses]
    assert [address for address in addresses if not any(path.startswith(address) for path in PAGES)] == []


def test_all_runs_are_listed_and_hostile_names_are_text(page, address):
    page.goto(f"{address}/runs")
    sees(page, "dead")
    assert page.locator("tbody tr").count() == 5 and page.get_by_text("29 of 20").count() == 3
    assert page.get_by_text("<img src=x").count() >= 1
    page.get_by_label("filter").fill("TAGGING 0/c dead")
    page.wait_for_function("document.querySelectorAll('tbody tr').length == 1")
    page.wait_for_url("**find=TAGGING*")
    page.get_by_role("button", name="dark or light").click()
    page.locator("body.body--dark").wait_for()
    page.reload()
    page.wait_for_function("document.querySelectorAll('tbody tr').length == 1")
    page.locator("body.body--dark").wait_for()
    page.get_by_role("button", name="dark or light").click()
    page.locator("body.body--light").wait_for()
    page.get_by_label("filter").fill("no such run")
    sees(page, "No run yet")
    page.get_by_label("filter").fill("")
    page.get_by_label("all runs").click()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/compare?run=*")
    page.locator("canvas").first.wait_for()


def test_a_tab_has_an_address(page, address):
    page.goto(f"{address}/run/0/c")
    page.get_by_role("tab", name="Settings").click()
    page.get_by_role("tab", name="Log").click()
    page.wait_for_url("**tab=Log")
    page.go_back()
    page.wait_for_url("**tab=Settings")
    page.reload()
    page.get_by_role("tab", name="Settings", selected=True).wait_for()


def test_curves_and_the_log_move_while_the_run_goes_on(page, address, runs):
    page.goto(f"{address}/run/0/c")
    read = "Array.from(document.querySelectorAll('canvas'), canvas => canvas.toDataURL().length).join()"
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(1_000)
    before = page.evaluate(read)
    with (runs / "c/metrics.jsonl").open("a") as metrics, (runs / "c/log.txt").open("a") as log:
        metrics.write("".join(line(step, loss=float(step % 7)) for step in range(30, 90)) + '{"step": 91, "ki')
        log.write("a line that is new\n")
    page.wait_for_function(f"before => {read} != before", arg=before, timeout=240_000)
    page.get_by_role("tab", name="Log").click()
    sees(page, "a line that is new")


def status_of(url, **headers):
    """Return the status of an answer; each, a refusal too, has the headers that keep it from other sites."""
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
        assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == (
            "nosniff",
            "no-referrer",
        )
        return answer.status


@pytest.mark.parametrize("path", [
    "/run/0/../../etc", "/run/0/%2e%2e/%2e%2e/etc", "/run/1/a", "/run/x", "/picture/0/a?file=../c/plots/x.png",
    "/picture/0/a?file=config.json", "/picture/0/a?file=/etc/passwd", "/review?run=0/nowhere",
    "/run/0/a%00", f"/run/0/{LONG}", f"/run/{LONG}/a", f"/picture/0/{LONG}?file=x.png", f"/picture/0/a?file={LONG}.png",
    "/picture/0/a?file=%00.png", "/review?run=0/%00",
])  # fmt: skip
def test_only_runs_below_the_roots_are_shown(address, path):
    assert status_of(address + path) == 404


@pytest.mark.parametrize("path", ["/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"])
def test_pages_of_other_sites_are_refused(address, path):
    assert [status_of(address + path, Origin=origin) for origin in (address, "http://evil.example", "null")] == [
        200, 403, 403,
    ]  # fmt: skip
    for headers in ({"Host": "evil.example"}, {"Content-Length": "99999999"}, {"Transfer-Encoding": "chunked"}):
        assert status_of(address + path, **headers) == 403


def test_files_of_the_page_and_a_request_without_a_word(page, address):
    page.goto(address)
    file = page.evaluate("performance.getEntriesByType('resource')[0].name")
    assert [status_of(url) for url in (file, f"{address}/picture/0/a")] == [200, 422]
    assert "cannot be written" in page.request.post(f"{address}/drop?folder=a&path={LONG}.txt").text()


def test_other_machines_are_refused(address, runs, tmp_path):
    token = "a-long-random-text"
    with serve(f"runs={runs}", "view.host=0.0.0.0", f"view.token={token}") as known:
        port = known.rpartition(":")[2]
        assert port != address.rpartition(":")[2], "the next free port"
        bare = f"http://127.0.0.1:{port}/"
        assert [status_of(f"{bare}{word}") for word in ("", "?token=wrong", f"?token={token}")] == [403, 403, 200]
        assert status_of(bare, Cookie=f"atelier_token={token}") == 200
        assert status_of(f"{bare}none?token={token}") == 404
    wrong = {"view.host=0.0.0.0": "set view.token", f"runs={tmp_path}/none": "is no folder"}
    wrong[f"data.root={tmp_path}/none"] = "does not exist"
    for words, reason in wrong.items():
        with refuses(reason):
            run("view", [f"runs={runs}", words], tmp_path)


def test_a_tab_may_close_at_any_time(browser, address):
    for path in ("/", "/run/0/a", "/try"):
        for wait_ms in (0, 50, 400):
            page = browser.new_page()
            page.goto(address + path, wait_until="commit")
            page.wait_for_timeout(wait_ms)
            page.close()

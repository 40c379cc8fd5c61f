"""All runs in a browser: a sweep opens to its runs, and pins stay first."""

import pytest

from tests.utils.record.test_run_index import make_run, said
from tests.viewer.conftest import HOSTILE, sees
from utils.io.files import write_json


@pytest.fixture(scope="module")
def runs(folder):
    """A sweep of three jobs, and two runs."""
    for rate, value in ((1, 0.25), (2, 0.75), (3, None)):
        run = make_run(folder / f"rates/lr={rate}", complete_json="{}", overrides_txt=f"optim.lr={rate}\n{HOSTILE}=1\n")
        if value is not None:
            write_json(run / "result.json", {"metric": 1, "value": value, "step": 4, "is_lowest_best": False})
    make_run(folder / HOSTILE.replace("/", ""), progress_json=said("stopped"))
    make_run(folder / "other")
    return folder


def test_a_sweep_opens_and_pins_stay_first(page, address):
    page.goto(f"{address}/runs")
    sees(page, "3 of 3 runs")
    assert page.locator("tbody tr").count() == 3 and not page.get_by_role("link", name="lr=2").is_visible()
    page.get_by_text("rates", exact=True).click()
    page.get_by_role("link", name="lr=2").wait_for()
    page.get_by_label("pin other").click()
    page.get_by_label("pin other").and_(page.locator("[aria-pressed=true]")).wait_for()
    jobs = page.locator("td details a").all_inner_texts()  # the sweep is still open
    assert jobs == ["lr=2", "lr=1", "lr=3"] and page.locator("td pre").inner_text().startswith("settings")
    page.reload()
    page.get_by_label("pin other").and_(page.locator("[aria-pressed=true]")).wait_for()
    page.locator("th", has_text="Run").click()
    assert "other" in page.locator("tbody tr").first.inner_text()  # pinned, whatever is sorted
    assert page.get_by_role("link", name="<img").count() == 1
    page.get_by_label("Columns").fill("task.n")
    page.get_by_role("option", name="task.name").click()
    page.get_by_label("By collection").click()
    page.reload()
    page.get_by_role("heading", name="No collection").wait_for()
    page.get_by_role("columnheader", name="task.name").wait_for()

"""`/watch`: what is wrong with the runs, told to the user's command and webhook, too; and the load of this machine."""

import asyncio
import re
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import psutil
from nicegui import app, ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls, hide_secrets, safe_lines
from utils.record.curves import Curves
from utils.record.logging import get_logger
from utils.record.run_index import RunIndex
from viewer.config import AlertsConfig
from viewer.parts import REFRESH_SEC, run_name
from viewer.site import Site

log = get_logger(__name__)
_CHECK_SEC = 10.0  # between two checks
_TELL_SEC = 10.0  # for the command, and for the webhook
_NO_STEP_SEC = 1800.0  # without a step or a batch of an evaluation
_SLOW_SHARE = 0.5  # of the images per second before
_RECENT = 3  # rows of training, whose median speed is compared with the median before
_GPUS = ["nvidia-smi", "--query-gpu=name,utilization.gpu,memory.used,memory.total", "--format=csv,noheader"]
_SLOT = """<q-td :props="props"><a v-if="props.row.link" :href="props.row.link">{{ props.row.what }}</a>
<span v-else>{{ props.row.what }}</span><div class="muted">{{ props.row.text }}</div>
<q-linear-progress :value="props.row.share" :color="props.row.link && 'negative'"
:aria-label="props.row.what" /></q-td>"""
# What may be wrong with a run that trains.
RULES = {
    "the training loss is not finite": lambda run, curves, _: _last(curves, "epoch") > _last(curves, "loss"),
    "the images per second have fallen": lambda run, curves, _: _speed(curves) < _SLOW_SHARE,
    "its disk is nearly full": lambda run, _, limits: psutil.disk_usage(str(run.path)).free < limits.disk_gib * 2**30,
    "no step for long": lambda run, *_: time.time() - run.told > _NO_STEP_SEC,
}


def _last(curves: Curves, figure: str) -> int:
    steps, values = curves.series("train", figure)
    return int(steps[np.isfinite(values)].max(initial=-1))


def _speed(curves: Curves) -> float:
    """Return the images per second as a share of those before; 1 as long as little is known."""
    rates = curves.series("train", "images_per_sec")[1]
    before, now = np.split(rates[np.isfinite(rates)], [-_RECENT])
    return float(np.median(now) / np.median(before)) if len(before) >= _RECENT else 1.0


class Watch:
    """raised: the alerts of now, with their runs. failures: of the command and the webhook at the last alert."""

    def __init__(self, index: RunIndex, limits: AlertsConfig) -> None:
        self._index = index
        self._limits = limits
        self._started = time.time()
        self.raised = set[tuple[Path, str]]()
        self.failures = dict[str, str]()

    def check(self) -> None:
        """Look at all runs, and tell what is newly wrong. Runs that had ended before this start are no news."""
        found = set[tuple[Path, str]]()
        for run in self._index.states():
            if run.state == "running" and run.path.is_dir():
                curves = self._index.curves(run.path)
                found |= {(run.path, alert) for alert, is_wrong in RULES.items() if is_wrong(run, curves, self._limits)}
            elif run.state in ("failed", "dead") and run.told > self._started:
                found.add((run.path, "ended without finishing"))
        new = found - self.raised
        self.raised = found
        for path, alert in sorted(new):
            self._tell(hide_secrets(escape_controls(f"{path.parent.name}/{path.name}: {alert}")))

    def _tell(self, text: str) -> None:
        log.warning("%s", text)
        for key, tell in (("command", self._run_command), ("webhook", self._post)):
            self.failures.pop(key, None)
            try:
                tell(text)
            except Exception as error:  # a program and a server of the user's may do anything
                reason, *_ = str(error).split(" for url ")  # the address of a webhook is its secret
                self.failures[key] = safe_lines(f"view.alerts.{key}: {reason}")
                log.warning("%s", self.failures[key])

    def _run_command(self, text: str) -> None:
        if self._limits.command:
            subprocess.run(self._limits.command, input=text.encode(), timeout=_TELL_SEC, check=True)

    def _post(self, text: str) -> None:
        if self._limits.webhook:
            httpx.post(self._limits.webhook, json={"text": text}, timeout=_TELL_SEC).raise_for_status()

    def rows(self) -> list[Json]:
        """Return rows of alerts, GPUs (as nvidia-smi has them), CPU, memory, and disks of the folders with runs."""
        found = []

        def add(what: str, text: str, share: float, link: str = "") -> None:
            row = {"id": len(found), "what": escape_controls(what), "text": text, "share": share, "link": link}
            found.append(row)

        for name, alert in sorted((run_name(self._index, path), alert) for path, alert in self.raised):
            add(name, alert, 1.0, f"/run/{quote(name)}")
        try:
            gpus = subprocess.run(_GPUS, capture_output=True, text=True, timeout=_TELL_SEC, check=True).stdout
        except (OSError, subprocess.SubprocessError):  # a machine without them
            gpus = ""
        for name, busy, text in (line.split(", ", 2) for line in gpus.splitlines()):
            share = re.match(r"\d+", busy)  # [N/A] on a part of a GPU
            add(f"GPU {name}", f"{busy} busy, memory {text}", int(share[0]) / 100 if share else 0.0)
        busy = psutil.cpu_percent()
        add("CPU", f"{busy:.0f} % of {psutil.cpu_count()} cores", busy / 100)
        memory = psutil.virtual_memory()
        spaces = [("memory", memory.available, memory.total)]
        for root in filter(Path.is_dir, self._index.roots):
            disk = psutil.disk_usage(str(root))
            spaces.append((f"disk of {root}", disk.free, disk.total))
        for name, free, total in spaces:
            add(name, f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free", 1 - free / total)
        return found


def add_page(site: Site) -> None:
    """Add the page. The runs are watched as long as the server runs, also while no page is open."""
    watch = Watch(site.index, site.limits)

    async def check() -> None:
        await asyncio.to_thread(watch.check)
        site.alerts = len(watch.raised)

    app.timer(_CHECK_SEC, check)

    @ui.page("/watch")
    async def show() -> None:
        with site.page("Watch"):
            said = ui.label().style("white-space: pre-wrap")
            table = ui.table(columns=[{"name": "row", "align": "left"}], rows=[]).classes("w-full")
            table.props("hide-header").add_slot("body-cell-row", _SLOT)

            async def refresh() -> None:
                table.rows = await asyncio.to_thread(watch.rows)
                said.text = "\n".join([f"Alerts: {len(watch.raised)}", *watch.failures.values()])

            await refresh()
            ui.timer(REFRESH_SEC, refresh)

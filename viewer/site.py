"""What all pages share: the runs, the collections, the networks, the alerts, and the frame of a page."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nicegui import ui

from utils.record.run_index import RunIndex
from viewer.config import AlertsConfig
from viewer.images import Shelf
from viewer.networks import Networks
from viewer.parts import ACCENT

_STYLE = """
body { font-size: 15px; font-variant-numeric: tabular-nums }
.nicegui-content { padding: 16px; max-width: 1600px; margin: 0 auto; width: 100% }
.muted { opacity: .7 } .mono { font-family: ui-monospace, monospace; font-size: 13px }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)) }
.chart { height: 240px; width: 100% }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); font-size: 13px }
.level-1 { color: #e67700 } .level-2 { color: #e03131 }
.from-1 .level-0, .from-2 .level-0, .from-2 .level-1 { display: none }
.q-table td, .q-table th { font-size: 14px } .q-table th { white-space: nowrap } .q-table tbody tr { cursor: pointer }
summary { display: list-item; font-weight: 500 }
.bar { padding: 1px 6px; border-radius: 3px; background:
  linear-gradient(to right, transparent calc(var(--least) - 1px), currentColor 0, transparent calc(var(--least) + 1px)),
  linear-gradient(to right, rgba(28, 109, 208, .3) var(--prob), rgba(134, 142, 150, .1) 0) }
.q-uploader__subtitle { display: none }
.alike .q-img { aspect-ratio: 1 }
.alike { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)) }
.seen { width: 256px; max-width: 100%; image-rendering: pixelated }
:focus-visible { outline: 2px solid #1c6dd0; outline-offset: 2px }
"""


def set_looks() -> None:
    """Set how elements look on all pages."""
    looks = {
        ui.button: "no-caps unelevated",
        ui.card: "flat bordered",
        ui.image: "fit=contain no-spinner",
        ui.input: "dense outlined clearable",
        ui.select: "dense outlined options-dense",
        ui.table: "flat bordered wrap-cells",
    }
    for element, look in looks.items():
        element.default_props(look)
    ui.card.default_classes("q-pa-sm")
    ui.row.default_classes("items-center w-full")


@dataclass
class Site:
    """The parts that pages use. alerts: the number of those raised now, which every header shows."""

    index: RunIndex
    shelf: Shelf
    networks: Networks
    limits: AlertsConfig
    alerts: int = 0

    @contextmanager
    def page(self, title: str) -> Iterator[None]:
        """Frame a page: its header with the way back."""
        ui.colors(primary=ACCENT)
        ui.add_css(_STYLE)
        ui.page_title(f"{title} - Atelier")
        with ui.header().classes("items-center no-wrap gap-3 q-px-md q-py-sm").style("background: #212529"):
            ui.link("Atelier", "/").classes("text-white text-weight-bold no-underline text-subtitle1")
            ui.link("Collections", "/collection").classes(_LINK)
            ui.link("Try", "/try").classes(_LINK)
            ui.link("", "/watch").bind_text_from(self, "alerts", _show_alerts).classes(_LINK)
            ui.label(title).classes("text-white ellipsis col text-right").style("opacity: .8")
        yield


_LINK = "text-white no-underline text-no-wrap"


def _show_alerts(count: int) -> str:
    return f"Watch ⚠ {count}" if count else "Watch"

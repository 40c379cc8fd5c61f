"""`/compare?run=A&run=B`: what differs between runs, what two of them say of the same images, and all their curves."""

import asyncio
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
from fastapi import Query
from nicegui import ui

from utils.config.recipe import flatten
from utils.io.files import Json, read_json, readable
from utils.io.safe_text import escape_controls
from utils.record.figures import show_cell, show_name
from utils.record.run_index import find_runs
from utils.record.run_reader import RunReader
from utils.record.tables import find_image_table, read_newest
from viewer.curves import show_curves
from viewer.overview import describe_next
from viewer.parts import REFRESH_SEC, Part, Sheet, run_name, show_heading, show_status
from viewer.results import Tables, describe_prediction, show_images
from viewer.site import Page, Site

_MOST = 20  # runs: each has a colour of its own
_IMAGES = 24  # shown of a kind
# What a run's log says of its data; the last line of a kind counts.
_DATA = re.compile(r"(?m)(?:^  |DEBUG |INFO )(?:data\.)?(collection|corrections):? +(.+)$")
_TITLES = (  # of classes, and of tags
    ("only {0} right", "only {1} right", "both wrong"),
    ("{0} errs less", "{1} errs less", "both err alike"),
)


def list_facts(path: Path) -> Json:
    """Return what the table says of a run: the newest figures, the data, and the settings."""
    run = RunReader(path)
    facts = {f"best {show_name(run.result['metric'])}": run.result["value"]} if run.result else {}
    for row in run.rows[-1:]:
        facts |= {f"last {show_name(name)}": value for name, value in flatten(row).items()}
    facts |= {f"data: {name}": text for name, text in _DATA.findall((path / "log.txt").read_text("utf-8"))}
    for file in sorted(path.glob("checkpoints/*/state.json"))[-1:]:
        facts |= flatten(read_json(file)["fingerprints"], "fingerprint of ")
    return facts | flatten({**run.config, "run_dir": None})


def list_differences(facts: Sequence[Json]) -> list[dict]:
    """Return the rows of the table, with a column for each run: what is not the same in all."""
    rows = []
    for key in dict.fromkeys(itertools.chain(*facts)):
        texts = [escape_controls(show_cell(run.get(key))) for run in facts]
        if len({*texts}) > 1:
            rows.append({"key": escape_controls(key)} | {str(number): text for number, text in enumerate(texts)})
    return rows


def read_images(run: Path) -> dict[tuple[str, ...], Json]:
    """Return the rows of the newest table of images by its name, path and label, or tags, the highest loss first.

    There are none without the table. Raises UserError.
    """
    if (path := find_image_table(run)) is None:
        return {}
    with readable(path, "Parquet", "evaluate.py per_image=true writes it"):
        rows = pq.read_table(path).sort_by("rank").to_pylist()
        return {(path.name, row["path"], str(row.get("label") or row["tags"])): row for row in rows}


def pair_images(runs: Sequence[Path]) -> list[tuple[Json, Json]]:
    """Return the rows of the images that both runs have measured. Raises UserError."""
    first, second = map(read_images, runs)
    return [(row, second[key]) for key, row in first.items() if key in second]


def count_errors(row: Json) -> int:
    """Return 1 for a wrong class, or the number of tags that are wrong or missed."""
    return len(row["wrong"] + row["missed"]) if "missed" in row else row["wrong"]


class Next(Part, component="vue/next.vue"):
    """Two runs that have not measured the same images."""


class Verdict(Part, component="vue/verdict.vue"):
    """Whether the second of two runs is better than the first."""


class ComparePage(Page):
    """It compares the runs that are named, and all in a folder of runs, such as a sweep."""

    addresses = ["/compare"]

    async def show(self, run: Annotated[list[str], Query()] = (), taggers: str = "") -> None:
        """Compare runs, by their names or by the folders that they are in.

        taggers: the folder of a result of evaluate.py job=compare; then show its tables, and images where one errs.
        """
        index = self.site.index
        if taggers:
            folder = index.roots[0] / "evaluate" / Path(taggers).name
            with self.site.page("Compare taggers"):
                await ui.context.client.connected()
                await Tables(self.site, taggers, folder).show()
                for (tag, gain), rows in itertools.groupby(
                    read_newest(folder, "arena_images"), lambda row: (row.pop("tag"), row.pop("gain"))
                ):
                    show_heading(escape_controls(f"{tag}: AP {float(gain):+.3f}"), 2)
                    lines = [[row.pop("path"), *map(": ".join, row.items())] for row in rows]
                    await show_images(folder, self.site.shelf, lines)
            return
        wanted = tuple(f"{name.rstrip('/')}/" for name in run)
        with self.site.page("Compare runs"):
            status = show_status("Reading the runs")
            await ui.context.client.connected()
            every = await asyncio.to_thread(lambda: {run_name(index, path): path for path in find_runs(index.roots)})
            chosen = [name for name in every if f"{name}/".startswith(wanted)]
            named = {escape_controls(name.removeprefix("0/")): every[name] for name in chosen}
            rows = await asyncio.to_thread(lambda: list_differences([*map(list_facts, [*named.values()][:_MOST])]))
            status.text = "" if named else "There is no such run."
            if len(named) == 2:
                await _show_pair(self.site, named)
            changed = [row["key"].removeprefix("data: ") for row in rows if row["key"].startswith("data: ")]
            ui.label(f"They saw other data: {', '.join(changed)}.").set_visibility(bool(changed))
            labels = {"key": "What differs"} | {str(number): name for number, name in enumerate([*named][:_MOST])}
            await Sheet("differs", ["differs"], "key", lambda _: (labels, rows)).fill()
            groups = await asyncio.to_thread(gather, named)
            await show_curves(
                lambda: {names[0]: [index.curves(named[name]) for name in names] for names in groups},
                "No figures: mark runs in the table of runs and choose Compare.",
            )


def gather(named: Mapping[str, Path]) -> list[list[str]]:
    """Return names of runs in groups. The runs of a group differ by their seed alone."""

    def recipe(name: str) -> str:
        return str({**RunReader(named[name]).config, "run_dir": "", "seed": 0})

    return [[*names] for _, names in itertools.groupby(sorted(named, key=recipe), recipe)]


def _offer_measuring(site: Site, runs: Sequence[Path]) -> None:
    """Offer to measure both runs on the same images, and load the page again when that is done."""
    commands = [["python", "evaluate.py", f"run_dir={run}", "split=val", "per_image=true"] for run in runs]
    waits = any(site.queue.awaits(words) for _, *words in commands)
    nexts = [describe_next(site.queue, run, command) for run, command in zip(runs, commands)]
    part = Next(nexts=nexts, waits=waits)

    async def start() -> None:
        part.props["waits"] = True
        timer.activate()
        for _, *words in commands:
            await asyncio.to_thread(site.queue.act, "", "Add", words)

    async def look() -> None:
        if await asyncio.to_thread(pair_images, runs):
            ui.navigate.reload()

    part.on("start", start)
    timer = ui.timer(REFRESH_SEC, look, active=waits)


async def _show_pair(site: Site, named: Mapping[str, Path]) -> None:
    """Show images that only one of two runs has right, and images that both have wrong; of tags, who errs less."""
    names = [*named]
    runs = [*named.values()]
    pairs = await asyncio.to_thread(pair_images, runs)
    if not pairs:
        _offer_measuring(site, runs)
        return
    groups = {title.format(*names): [] for title in _TITLES["missed" in pairs[0][0]]}
    for pair in pairs:
        less, more = map(count_errors, pair)
        if less or more:
            [*groups.values()][2 if less == more else less > more].append(pair)
    counts = {title: len(shown) for title, shown in groups.items()}
    less, more, _ = counts.values()
    from scipy.stats import binomtest

    ends = [*binomtest(more, less + more).proportion_ci()] if less + more else [0.0, 1.0]
    Verdict(names=names, counts=counts, images=len(pairs), ends=ends)
    for title, shown in groups.items():
        if not shown:
            continue
        show_heading(f"{title}: {len(shown):,}", 2)
        rows = [
            [one["path"], names[0], *describe_prediction(one)[1:], names[1], *describe_prediction(other)[1:]]
            for one, other in shown[:_IMAGES]
        ]
        await show_images(runs[0], site.shelf, rows)

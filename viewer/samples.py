"""`/samples?run=A&run=B`: pictures of prompts by runs and steps, and which of two is better.

RUN/preferences.jsonl has a line for each choice: `prompt`, `negative`, `seed`, `tie`, and `chosen` and `rejected`,
which are files in the same run. Of a tie they are in no order. RUN/preferences is a collection of pairs, which
task.preference_beta trains: chosen/, with the prompts as captions, and rejected/.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Query
from nicegui import ui
from nicegui.events import GenericEventArguments
from PIL import Image

from utils.io.files import refuse_links_out, sha256_text, write_text
from utils.io.safe_text import escape_controls
from viewer.parts import Part, find_run, show_status
from viewer.run import find_pictures
from viewer.site import Page, Site

FILE = "preferences.jsonl"


class Samples(Part, component="vue/samples.vue"):
    """Pictures of prompts, two of them over each other."""


def choose(run: Path, prompts: Sequence[Any], number: int, files: Sequence[Path], key: str) -> tuple[str, str]:
    """Keep which picture of a prompt is better, in place of an earlier choice between the two.

    files: two, in order; key: 1, the first is better, 2, the second one, 0, or "": neither.
    Returns the line of the choice and the key of the earlier one. Raises OSError, UserError.
    """
    refuse_links_out("run_dir", run)
    pair = sha256_text(f"{files} {number}")[:16]
    table = run / FILE
    lines = table.read_text("utf-8").splitlines(keepends=True) if table.exists() else []
    earlier = next((line for line in lines if pair in line), "")
    names = [Path(json.loads(earlier)[side]) for side in ("chosen", "rejected")] if earlier else []
    earlier_key = names[0].stem[-1] if names else ""
    if key == earlier_key:
        return earlier, key
    line = _write_pair(run, prompts, number, files, f"{pair}-{key}") if key else ""
    write_text(table, "".join([*(other for other in lines if other != earlier), line]))
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).with_suffix(".txt").unlink(missing_ok=True)
    return line, earlier_key


def _write_pair(run: Path, prompts: Sequence[Any], number: int, files: Sequence[Path], stem: str) -> str:
    """Write the pictures of a prompt in two files and the caption; return the line of the choice that ends the stem."""
    prompt = prompts[number]
    height, width = prompt.image_size_hw
    left = sum(other.image_size_hw[1] for other in prompts[:number])
    key = stem[-1]
    ending = "_or_tied" * (key == "0")
    chosen, rejected = (f"preferences/{kind}{ending}/{stem}.png" for kind in ("chosen", "rejected"))
    for name, file in zip((chosen, rejected), files[:: -1 if key == "2" else 1]):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.crop((left, 0, left + width, height)).save(run / name)
    write_text((run / chosen).with_suffix(".txt"), prompt.text)
    values = {"prompt": prompt.text, "negative": prompt.negative, "seed": prompt.seed, "tie": key == "0"}
    return json.dumps(values | {"chosen": chosen, "rejected": rejected}) + "\n"


class SamplesPage(Page):
    """It shows the runs with equal prompts; the first run that has any keeps the choices."""

    addresses = ["/samples"]

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._prompts: Sequence[Any] = ()
        self._files: list[Path] = []
        self._made: list[tuple[str, int, list[Path], str]] = []  # by this page: what `_choose` takes back
        self._lock = asyncio.Lock()

    async def show(self, run: Annotated[list[str], Query()], left: int = 0, right: int = -1, here: int = 0) -> None:
        """Show the pictures of runs. left, right: rows over each other; here: the prompt that a choice is about."""
        paths = {name: find_run(self.site.index, name) for name in run}
        with self.site.page("Samples"):
            self._status = show_status("Looking for pictures")
            await ui.context.client.connected()
            strips = []
            for name, path in paths.items():
                strips += await self._read(name, path)
            self._status.text = "" if strips else "No pictures of task.samples.prompts yet."
            texts = [escape_controls(prompt.text) for prompt in self._prompts]
            shares = [prompt.image_size_hw[1] for prompt in self._prompts]
            if strips:
                start = [left % len(strips), right % len(strips), here % len(texts)]
                Samples(strips=strips, prompts=texts, shares=shares, start=start).on("press", self._press)

    async def _read(self, name: str, path: Path) -> list[dict[str, str]]:
        """Return the names and addresses of a run's strips of pictures, in the order of its steps."""
        prompts = await asyncio.to_thread(self.site.list_prompts, path)
        if not self._prompts:
            self._prompts = prompts
            self._first = path
        if str(prompts) != str(self._prompts):
            ui.label(f"{escape_controls(name)} is left out: it has other prompts, or none.")
            return []
        strips = []
        for step, file in find_pictures(path).get("plots/samples.png", {}).items():
            self._files.append(path / file)
            when = f"step {step}" if step else "before training"
            address = f"/picture/{quote(name)}?file={quote(file)}"
            strips.append({"name": f"{escape_controls(name)}, {when}", "src": address})
        return strips

    async def _press(self, event: GenericEventArguments) -> None:
        """Do what a key means: 1, 2 and 0 choose, u takes the last choice of this page back."""
        key, left, right, here = event.args
        async with self._lock:
            if key == "u" and self._made:
                line, *before = self._made.pop()
                if line in (self._first / FILE).read_text("utf-8"):  # else another tab has chosen since
                    await self._choose(*before)
            elif key != "u" and left != right:
                files = [self._files[left], self._files[right]]
                if files != sorted(files):
                    files.reverse()
                    key = {"1": "2", "2": "1"}.get(key, key)
                line, earlier = await self._choose(here, files, key)
                if earlier != key:
                    self._made.append((line, here, files, earlier))
        self._status.text = f"Kept in {FILE}; choices to undo: {len(self._made)}"

    async def _choose(self, number: int, files: list[Path], key: str) -> tuple[str, str]:
        return await asyncio.to_thread(choose, self._first, self._prompts, number, files, key)

"""`/samples?run=A&run=B`: pictures of prompts by runs and steps, two of them over each other."""

import asyncio
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import Query
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from viewer.parts import REFRESH_SEC, Part, find_run
from viewer.run import find_pictures
from viewer.site import Page


class Samples(Part, component="vue/samples.vue"):
    """Pictures of prompts, two of them over each other."""


class SamplesPage(Page):
    """It shows the runs whose prompts are those of the first one."""

    addresses = ["/samples"]

    async def show(self, run: Annotated[list[str], Query()]) -> None:
        """Show the pictures of runs, also while they train; the address has which two are over each other."""
        paths = {name: find_run(self.site.index, name) for name in run}
        with self.site.page("Samples"):
            samples = Samples(runs=[])
            await ui.context.client.connected()

            async def draw() -> None:
                samples.props["runs"] = [await asyncio.to_thread(self._read, *each) for each in paths.items()]

            await draw()
            ui.timer(REFRESH_SEC, draw)

    def _read(self, name: str, path: Path) -> Json:
        """Return a run's prompts, the widths of their pictures, and its strips in the order of its steps."""
        prompts = self.site.list_prompts(path)
        files = find_pictures(path).get("plots/samples.png", {})
        strips = [[step, f"/picture/{quote(name)}?file={quote(file)}"] for step, file in files.items()]
        texts = [escape_controls(prompt.text) for prompt in prompts]
        shares = [prompt.image_size_hw[1] for prompt in prompts]
        run = {"name": escape_controls(name.removeprefix("0/")), "prompts": texts, "shares": shares}
        return run | {"said": str(prompts), "strips": strips}

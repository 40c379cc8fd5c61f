"""`/samples?run=A&run=B`: pictures of prompts by runs and steps, two of them over each other."""

import asyncio
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import Query
from nicegui import ui

from utils.io.safe_text import escape_controls
from viewer.parts import Part, find_run, show_status
from viewer.run import find_pictures
from viewer.site import Page, Site


class Samples(Part, component="vue/samples.vue"):
    """Pictures of prompts, two of them over each other."""


class SamplesPage(Page):
    """It shows the runs with equal prompts."""

    addresses = ["/samples"]

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._prompts = ()

    async def show(self, run: Annotated[list[str], Query()], left: int = 0, right: int = -1) -> None:
        """Show the pictures of runs. left, right: rows over each other."""
        paths = {name: find_run(self.site.index, name) for name in run}
        with self.site.page("Samples"):
            status = show_status("Looking for pictures")
            await ui.context.client.connected()
            strips = []
            for name, path in paths.items():
                strips += await self._read(name, path)
            status.text = "" if strips else "No pictures of task.samples.prompts yet."
            texts = [escape_controls(prompt.text) for prompt in self._prompts]
            shares = [prompt.image_size_hw[1] for prompt in self._prompts]
            if strips:
                Samples(strips=strips, prompts=texts, shares=shares, start=[left % len(strips), right % len(strips)])

    async def _read(self, name: str, path: Path) -> list[dict[str, str]]:
        """Return the names and addresses of a run's strips of pictures, in the order of its steps."""
        prompts = await asyncio.to_thread(self.site.list_prompts, path)
        self._prompts = self._prompts or prompts
        if str(prompts) != str(self._prompts):
            ui.label(f"{escape_controls(name)} is left out: it has other prompts, or none.")
            return []
        strips = []
        for step, file in find_pictures(path).get("plots/samples.png", {}).items():
            when = f"step {step}" if step else "before training"
            address = f"/picture/{quote(name)}?file={quote(file)}"
            strips.append({"name": f"{escape_controls(name)}, {when}", "src": address})
        return strips

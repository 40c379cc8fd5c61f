"""`/try`: what a network says of an image that is dropped, chosen or pasted, and a collection's images most like it."""

import asyncio
import base64
import io
import itertools

from nicegui import events, ui

from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.formats.thresholds import CATEGORY_PROFILES, PER_TAG
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from viewer.images import Shelf
from viewer.parts import UNLABELLED, Chooser, Part, find_run, show_status
from viewer.site import Page

_ADVICE = (
    "The page of a collection finds the images most like a picture. To add a new image, save it in the collection's "
    "folder, with a label like the other images."
)
MAX_BYTES = 64 * 2**20  # of an upload


def list_choices(shelf: Shelf) -> list[str]:
    """Return runs that can answer, and their weight files."""
    runs = [run.path for run in shelf.runs.states() if run.task not in UNLABELLED]
    files = itertools.chain.from_iterable(
        (run, *run.glob("weights/*.safetensors"), *run.glob("export*/**/*.onnx")) for run in runs
    )
    return [str(file) for file in files if str(file) == escape_controls(str(file))]


class Answers(Part, component="vue/answers.vue"):
    """What networks say of images, side by side."""


class TryPage(Page):
    """The page in one tab."""

    addresses = ["/try"]

    async def show(self, run: str = "") -> None:
        """Show the page: weight files of runs to choose from. run: the name of the chosen one."""
        own = await asyncio.to_thread(list_choices, self.site.shelf)
        if run:
            own.sort(key=str(find_run(self.site.index, run)).__ne__)
        self._images = []
        self._newest = 0  # the number of the last question
        with self.site.page("Try an image"):
            self._build_choices(own)
            self._message = show_status("No image yet." if own else "No run yet: type the path of a weight file.")
            self._message.classes("muted").style("min-height: 24px")
            self._result = Answers(answers=[]).on("copy", lambda event: ui.clipboard.write(event.args))

    def _build_choices(self, own: list[str]) -> None:
        with ui.row():
            weights = ui.select(
                own,
                label="Runs, weight files, or folders with a WD tagger",
                value=own[:1],
                multiple=True,
                with_input=True,
                new_value_mode="add-unique",
            )
            self._weights = weights.props("aria-label=weights use-chips").classes("col").style("min-width: 260px")
            names = {name: name.replace("_", " ") for name in (PER_TAG, *CATEGORY_PROFILES)}
            self._profile = ui.select(names, label="Thresholds", value=PER_TAG)
            self._profile.style("min-width: 160px").set_visibility(False)  # a classifier has none
        for choice in (self._weights, self._profile):
            choice.on_value_change(self._ask)
        upload = ui.upload(multiple=True, auto_upload=True, on_multi_upload=self._take)
        with upload.add_slot("header"), Chooser(label="Drop, paste or choose images"):
            ui.label(_ADVICE)
        upload.on_rejected(self._refuse).on("failed", self._refuse, args=[]).on("uploaded", upload.reset, args=[])
        upload.props(f"flat bordered max-total-size={MAX_BYTES}").classes("w-full")

    def _refuse(self) -> None:
        self._message.set_text(f"not taken: choose images of at most {MAX_BYTES >> 20} MiB together")

    async def _take(self, upload: events.MultiUploadEventArguments) -> None:
        self._images = [(await file.read(), escape_controls(file.name)) for file in upload.files]
        await self._ask()

    async def _ask(self) -> None:
        """Ask each network about each image; stop when another question is asked, or the tab is closed."""
        self._newest += 1
        number = self._newest
        rows = []
        for content, name in self._images:
            for weights in self._weights.value:
                self._message.text = f"{name}: computing; the first answer of a network takes seconds"
                answer = await asyncio.to_thread(self._answer, weights, content, name)
                if number != self._newest or self._result.is_deleted:
                    return
                rows.append(answer)
                self._result.props["answers"] = [*rows]
                self._message.text = ""
                self._profile.set_visibility(any(row.get("bars", {}).keys() - {"classes"} for row in rows))

    def _answer(self, weights: str, content: bytes, name: str) -> Json:
        """Return the row of an answer, or of the reason why there is none."""
        try:
            answer = self.site.networks.ask(weights, self._profile.value, content, name)
        except (UserError, UnreadableImage) as error:
            return {"facts": escape_controls(str(error))}
        answer.seen.save(file := io.BytesIO(), "PNG")
        seen = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        bars = {kind: [bar._asdict() for bar in shown] for kind, shown in answer.bars.items()}
        return {**answer._asdict(), "weights": weights, "seen": seen, "bars": bars}

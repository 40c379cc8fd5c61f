"""`/samples?run=A&run=B`: pictures of prompts by runs and steps, and which of two is better.

RUN/preferences.jsonl has a line for each choice: `prompt`, `negative`, `seed`, `tie`, and `chosen` and `rejected`,
which are files in the same run. Of a tie they are in no order. RUN/preferences is a collection of pairs, which
task.preference_beta trains: chosen/, with the prompts as captions, and rejected/.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

from fastapi import Query
from nicegui import ui
from nicegui.events import GenericEventArguments
from PIL import Image

from utils.io.files import refuse_links_out, sha256_text, write_text
from utils.io.safe_text import escape_controls
from utils.record.run_reader import RunReader
from viewer.parts import find_run, show_grid
from viewer.run import find_pictures
from viewer.site import Site

if TYPE_CHECKING:  # torch is imported when the first page is asked for
    from sdxl.config import Prompt

FILE = "preferences.jsonl"
# Quasar's template. Double braces show text, never markup. What is shown, wiped and enlarged stays in the browser.
_PAGE = """<div class="w-full samples" tabindex="0" role="group" aria-label="pictures"
  @vue:mounted="({el}) => el.focus()"
  @vue:updated="({el}) => { const page = el.ownerDocument.defaultView; const url = new page.URL(page.location)
    for (const name of ['left', 'right', 'here']) url.searchParams.set(name, props.row[name])
    page.history.replaceState({}, '', url) }"
  :style="{'--at': props.row.at + '%', '--zoom': props.row.zoom + '%', '--part': 100 / props.row.prompts.length + '%'}"
  @keydown.left.self.prevent="props.row.here = Math.max(props.row.here - 1, 0)"
  @keydown.right.self.prevent="props.row.here = Math.min(props.row.here + 1, props.row.prompts.length - 1)"
  @keydown.up.self.prevent="props.row.right = Math.max(props.row.right - 1, 0)"
  @keydown.down.self.prevent="props.row.right = Math.min(props.row.right + 1, props.row.strips.length - 1)"
  @keydown.self="'120u'.includes($event.key) && $parent.$emit('press', $event.key, props.row)">
  <div class="row items-center q-gutter-sm">
    <label v-for="side in ['left', 'right']">{{ side }} <select v-model.number="props.row[side]">
      <option v-for="(strip, number) in props.row.strips" :value="number">{{ strip.name }}</option></select></label>
    <label>wipe <input type="range" v-model="props.row.at"></label>
    <label>zoom <input type="range" min="100" max="1000" v-model="props.row.zoom"></label>
    better:
    <q-btn v-for="[key, title] in [['1', 'left'], ['2', 'right'], ['0', 'tie'], ['u', 'undo']]" no-caps unelevated
      dense color="primary" padding="4px 12px" :label="key.toUpperCase() + ' ' + title" @mousedown.prevent
      @click="$parent.$emit('press', key, props.row)" />
  </div>
  <div class="strips"><div>
    <div class="prompts" :style="{gridTemplateColumns: props.row.widths}">
    <button v-for="(text, number) in props.row.prompts" @click="props.row.here = number"
      :aria-pressed="number == props.row.here">{{ text }}</button></div>
    <div class="pair"><img v-for="side in ['left', 'right']" :class="side" :src="props.row.strips[props.row[side]].src"
      :alt="side + ': ' + props.row.strips[props.row[side]].name"></div>
    <template v-for="strip in props.row.strips"><div>{{ strip.name }}</div><img :src="strip.src" :alt="strip.name"
      loading="lazy"></template>
  </div></div></div>"""
_STYLE = """
.strips { overflow-x: auto; width: 100%; margin-top: 8px } .strips > div { width: var(--zoom) }
.strips img { width: 100%; display: block } .pair { display: grid; align-items: end } .pair img { grid-area: 1 / 1 }
.pair .right { mask: linear-gradient(to right, transparent var(--at), #000 0) 0 / var(--part) 100% }
.samples input { vertical-align: middle } .samples select { max-width: 100% } .samples label { max-width: 100% }
.prompts { display: grid; overflow-wrap: anywhere }
.prompts button { font: inherit; color: inherit; background: none; border: 0; border-top: 3px solid transparent;
  cursor: pointer; min-height: 24px } .prompts [aria-pressed=true] { border-color: #1c6dd0; font-weight: 600 }
"""


def read_prompts(run: Path) -> list["Prompt"]:
    """Return the prompts of a run's pictures, in the order of their columns."""
    from sdxl.config import SamplesConfig

    samples = RunReader(run).config.get("task", {}).get("samples")
    return SamplesConfig.model_validate(samples).complete_all() if samples else []


def keep(run: Path, prompts: Sequence["Prompt"], number: int, files: Sequence[Path], key: str) -> str:
    """Append a choice between the pictures of a prompt in two files; return its line. Raises OSError, UserError.

    key: 1, the first is better, 2, the second one, or 0.
    """
    refuse_links_out("run_dir", run)
    prompt = prompts[number]
    height, width = prompt.image_size_hw
    left = sum(other.image_size_hw[1] for other in prompts[:number])
    stem = sha256_text(f"{files} {number} {key}")[:16]
    ending = "_or_tied" * (key == "0")
    chosen, rejected = (f"preferences/{kind}{ending}/{stem}.png" for kind in ("chosen", "rejected"))
    for name, file in zip((chosen, rejected), files[:: -1 if key == "2" else 1]):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.crop((left, 0, left + width, height)).save(run / name)
    write_text((run / chosen).with_suffix(".txt"), prompt.text)
    values = {"prompt": prompt.text, "negative": prompt.negative, "seed": prompt.seed, "tie": key == "0"}
    line = json.dumps(values | {"chosen": chosen, "rejected": rejected}) + "\n"
    with (run / FILE).open("a") as file:
        file.write(line)
    return line


def add_page(site: Site) -> None:
    """Add the page. It shows the runs with equal prompts; the first run that has any keeps the choices."""

    @ui.page("/samples")
    async def show(run: Annotated[list[str], Query()], left: int = 0, right: int = -1, here: int = 0) -> None:
        paths = [find_run(site.index, name) for name in run]
        files = []
        strips = []
        prompts = []
        done = []
        lock = asyncio.Lock()

        async def press(event: GenericEventArguments) -> None:
            key, row = event.args
            async with lock:
                if key != "u":
                    done.append(
                        await asyncio.to_thread(
                            keep, first, prompts, row["here"], [files[row["left"]], files[row["right"]]], key
                        )
                    )
                elif done:
                    kept = first / FILE
                    line = done.pop()
                    write_text(kept, kept.read_text().replace(line, "", 1))
                    for file in first.glob(json.loads(line)["chosen"].replace(".png", ".*")):
                        file.unlink()
            said.text = f"{len(done)} choices are kept in {FILE}"

        with site.page("Samples"):
            ui.add_css(_STYLE)
            said = ui.label("Looking for pictures").props("role=status").style("overflow-wrap: anywhere")
            await ui.context.client.connected()
            for name, path in zip(run, paths):
                its = await asyncio.to_thread(read_prompts, path)
                if not prompts:
                    prompts = its
                    first = path
                if str(its) != str(prompts):
                    ui.label(f"{escape_controls(name)} is left out: it has other prompts, or none.")
                    continue
                for step, file in find_pictures(path).get("plots/samples.png", {}).items():
                    files.append(path / file)
                    when = f"step {step}" if step else "before training"
                    strips.append(
                        {
                            "name": f"{escape_controls(name)}, {when}",
                            "src": f"/picture/{quote(name)}?file={quote(file)}",
                        }
                    )
            said.text = "" if strips else "No pictures of task.samples.prompts yet."
            texts = [escape_controls(prompt.text) for prompt in prompts]
            widths = " ".join(f"{prompt.image_size_hw[1]}fr" for prompt in prompts)
            row = {"strips": strips, "prompts": texts, "widths": widths, "at": 50, "zoom": 100}
            if strips:
                row |= {"left": left % len(strips), "right": right % len(strips), "here": here % len(texts)}
            show_grid("page", _PAGE, [row] if strips else []).on("press", press)

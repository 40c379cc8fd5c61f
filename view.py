"""Open a local page over runs, also while they train (docs/viewer.md).

    python view.py                                  the runs below outputs/
    python view.py runs=[outputs,/other/outputs]    these folders; one: runs=FOLDER
    python view.py data.root=PATH                   and the images of this collection
    python view.py view.port=9000 view.open=false   prints the address, for a browser elsewhere (through ssh -L)
    python view.py view.host=0.0.0.0 view.token=TOKEN-OF-16-CHARACTERS      lets other machines in

Without view.host the page answers this machine alone.
"""

from utils.config.bounds import Some
from utils.start import begin

begin(__doc__)

from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.tags.rules import TextConfig
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathText, Strict
from utils.record.run_reader import RunReader
from viewer.config import PageConfig


class ShownData(DataConfig):
    """A collection to show. Without a root, the page shows the collections of runs alone."""

    root: PathText | None


class ViewConfig(Strict):
    """The page, the folders whose runs it shows, and one more collection."""

    runs: PathText | Some[PathText]
    view: PageConfig
    data: ShownData
    text: TextConfig


def load_network(path: Path) -> Any:
    """Return the predictor of a weight file as predict.py does, on the CPU: a GPU may be training; imports torch."""
    import torch

    from engine.exports.predictors import load_predictor

    return load_predictor(path, torch.device("cpu"))


def list_prompts(run: Path) -> list[Any]:
    """Return the prompts of a run's pictures, in the order of their columns."""
    from sdxl.config import SamplesConfig

    samples = RunReader(run).config.get("task", {}).get("samples")
    return SamplesConfig.model_validate(samples).complete_all() if samples else []


@entry_point("view", ViewConfig)
def main(config: ViewConfig, job: Job) -> None:
    """Serve the page."""
    from viewer.app import serve
    from viewer.networks import Networks

    runs = [config.runs] if isinstance(config.runs, str) else config.runs
    serve(runs, config.data, config.view, Networks(runs, load_network, config.text), list_prompts)


if __name__ == "__main__":
    main()

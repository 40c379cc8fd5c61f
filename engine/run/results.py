"""Read the figures that evaluate.py has measured of weights."""

from contextlib import suppress
from pathlib import Path

from utils.contracts import Figures
from utils.io.files import read_json

_NO_FIGURES = ("seconds", "step")


def read_results(folder: Path, weights_hash: str | None) -> dict[str, Figures]:
    """Return the figures of weights in a run folder, by the title of the images, such as `validation: 30 images`.

    Figures on training images are skipped.
    """
    results = {}
    for file in [*sorted(folder.glob("metrics*.json")), *sorted(folder.glob("evaluate/*/metrics*.json"))]:
        with suppress(OSError, ValueError, TypeError, KeyError):
            values = dict(read_json(file))
            if values["weights_hash"] == weights_hash and ("data" in values or values["split"] in ("val", "test")):
                results[str(values["measured"])] = {
                    name: value
                    for name, value in values.items()
                    if isinstance(value, int | float) and name not in _NO_FIGURES
                }
    return results

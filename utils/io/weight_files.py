"""Find weight files: of a run, a checkpoint, a folder of timm or transformers, or the hub. This needs no torch."""

from pathlib import Path

from utils.contracts import InitFrom
from utils.errors import UserError, about
from utils.io.files import read_beside
from utils.io.hub import fetch, is_reference
from utils.record.run_reader import RunReader

WEIGHT_NAMES = ("best", "last", "ema")  # if a run has an average, `best` is the best average
TAGGERS = read_beside(__file__, "taggers.yaml")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder that timm or transformers wrote


def find_initial(source: InitFrom) -> Path:
    """Return the weight file of a run's first weights. Raises UserError if there is none."""
    return find_weights(source.source, "ema" if source.weights == "ema" else "last")


def find_weights(run_or_file: str, which: str, *, onnx_first: bool = False) -> Path:
    """Return a weight file: the file itself, that of a folder of timm or transformers, `which` of a run or checkpoint.

    A name on the hub (utils/io/hub.py) is such a file or folder. onnx_first: for predictions, of a folder with both,
    such as published taggers, whose other file states no tags.

    Raises UserError, which lists the run's weight files.
    """
    path = Path(run_or_file.removeprefix("local-dir:"))
    names = ("model.onnx", *FOLDER_FILES) if onnx_first else (*FOLDER_FILES, "model.onnx")
    if is_reference(run_or_file):
        path = fetch(run_or_file, names, beside=("config.json", "preprocess.json", *TAGGERS))
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run folder or a weight file")
    if not path.is_dir():
        return path
    if (path / "weights").is_dir():
        return RunReader(path).weights(which)
    if is_run(path):  # a checkpoint
        names = ("average_weights.safetensors", "weights.safetensors")
        names = {"last": names[1:], "ema": names[:1]}.get(which, names)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} is no run folder and has no {' or '.join(names)}; name another, or a weight file")


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's, or one of its checkpoints."""
    return (path / "weights").is_dir() or (path / "state.json").is_file()


def choose_weights(run_dir: str, weights: str) -> Path:
    """Return a run's weights by name (best, step_000500), or the file, run or checkpoint that `weights` names."""
    is_path = not run_dir or Path(weights).exists() or is_reference(weights)
    if weights not in WEIGHT_NAMES and is_path:
        return find_weights(weights, "best")
    with about("weights" if Path(run_dir).is_dir() else "run_dir"):
        return find_weights(run_dir, weights)

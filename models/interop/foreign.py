"""Read the files beside another program's network, and return the metadata that a weight file of ours has.

| beside the network | what it states |
|---|---|
| config.json of timm | network and arguments; size, mean, std, interpolation of images; what our exports add |
| a file of utils/io/taggers.yaml | the outputs in order and, by convention, how the tagger takes images |
| preprocess.json of imgutils | by its presence, that the channels are RGB |
"""

from pathlib import Path

from models.config import timm_config
from models.interop.metadata import dict_of
from utils.formats.vocabulary import read_any_vocabulary
from utils.io.files import Json, Values, read_json, readable
from utils.io.weight_files import FOLDER_FILES, TAGGERS

CONFIG = "config.json"
OURS = "atelier"  # the key in config.json and in metadata of what our exports add


def read_config_beside(path: Path) -> Json:
    """Return the config.json in the folder of a weight file of timm or transformers. Raises UserError."""
    file = path.with_name(CONFIG)
    with readable(file, "JSON"):
        config = read_json(file) if path.name in FOLDER_FILES and file.is_file() else {}
    return config if isinstance(config, dict) else {}


def describe(path: Path, metadata: Values) -> Json:
    """Return the metadata of a file; for another program's tagger, with what the files beside it state.

    `channels` is the order that the weights take. Raises UserError.
    """
    rows = {path.with_name(name): row for name, row in TAGGERS.items()}
    file = next((file for file in rows if file.is_file()), None)
    if file is None or "task" in metadata:
        return dict(metadata)
    config = read_config_beside(path)
    described = {"output": "tags", "step": 0, **rows[file], **read_any_vocabulary(file, is_exact=True).facts()}
    with readable(path.with_name(CONFIG), "JSON"):
        stated = dict_of(config, "pretrained_cfg")
        images = {**rows[file]["preprocessing"], "image_size_hw": stated.get("input_size", [])[1:]}
        described["preprocessing"] = images | {key: value for key, value in stated.items() if key in images}
        if "architecture" in config:
            arguments = dict_of(config, "model_args")
            described["model"] = {**timm_config(config["architecture"]).model_dump(), "arguments": arguments}
    if path.with_name("preprocess.json").is_file():
        described["channels"] = "RGB"
    return described | dict_of(config, OURS) | metadata

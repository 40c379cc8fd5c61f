"""The licence, origin and names in the metadata of a weight file, which a stranger may have written."""

import re

from models.outputs import OUTPUTS
from utils.io.files import Values


def dict_of(metadata: Values, key: str) -> Values:
    """Return a dictionary in the metadata; empty if the value is something else."""
    value = metadata.get(key)
    return value if isinstance(value, dict) else {}


# Licences that the hub knows by name; another one is `other`, with its name.
LICENCES = re.compile(
    r"apache-2\.0|mit|(bigscience-|creativeml-|bigcode-)?openrail(\+\+|-m)?|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0"
    r"|[al]?gpl-[23]\.[01]|bsd-[23]-clause|unlicense|wtfpl|gemma|llama[23]|unknown|other"
)


def licence_of(metadata: Values) -> str | None:
    """Return the licence of a model's source weights, as the hub spells it if it knows it; `unknown` if not stated.

    Return None if training began with random weights, because then no other licence applies.
    """
    origin = dict_of(metadata, "origin")
    if "license" not in origin:
        return None
    stated = str(origin["license"] or "unknown")
    spelled = re.sub(r"[\s_-]+", "-", stated.lower())
    return spelled if LICENCES.fullmatch(spelled) else stated


def licence_entry(metadata: Values) -> dict[str, str]:
    """Return `license` for an exported file, or nothing without a licence."""
    licence = licence_of(metadata)
    return {} if licence is None else {"license": licence}


def label_names(metadata: Values) -> list[str]:
    """Return the names of a head's classes or tags; empty for a backbone."""
    return list(metadata.get(OUTPUTS[metadata["output"]].names_key, ())) if metadata["output"] else []


def base_model(metadata: Values) -> str | None:
    """Return the hub's name of the weights that training began with; None if they are not from there."""
    match = re.match(r"(?:hf:([\w.-]+/[\w.-]+)[/@]|timm ([\w.-]+)$)", str(dict_of(metadata, "origin").get("source")))
    return None if match is None else match[1] or f"timm/{match[2]}"

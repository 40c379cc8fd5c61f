"""What is known of where weights come from, above all their licence, which stays with what is trained from them.

An origin is JSON values: `source` (file, or name in timm), `layout`, `licence` (an identifier, or None: unknown). It
has no `licence` where the source is of a run that began with drawn weights.
"""

from pathlib import Path
from typing import Any

from utils.io.folder_config import read_config_beside
from utils.record.logging import get_logger

log = get_logger(__name__)

# Of the weights that facebookresearch/ConvNeXt-V2 released (its README and issue 2); its code is MIT.
RELEASED_LICENCE = "cc-by-nc-4.0"
_MAX_TEXT = 200  # characters of what a file says about itself


def find_origin(path: Path, layout: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the origin of a file's weights, and log their licence.

    The licence is what the file's metadata say, or the configuration beside it (timm's and transformers' folders). A
    torch file with the released files' layout and single entry is presumed to be one of them.
    """
    earlier = metadata.get("origin")
    earlier = earlier if isinstance(earlier, dict) else {}
    if "task" in metadata and "licence" not in earlier:
        return {"source": str(path), "layout": layout}
    licence = earlier.get("licence")
    if "task" in metadata or licence is not None:
        reason = "the file states it"
    else:
        licence, reason = _stated_beside(path), "config.json beside the file states it"
        if licence is None and layout == "official" and metadata.get("entries") == ["model"]:
            licence, reason = RELEASED_LICENCE, "presumed: the file is laid out as the weights that Meta released"
    if isinstance(licence, str) and licence != "unknown":
        licence = licence[:_MAX_TEXT]
        log.warning("licence of %s: %s (%s); it applies to what is trained from these weights", path, licence, reason)
    elif "task" not in metadata:
        log.info("licence of %s: not stated; Meta's weights of ConvNeXt V2 are %s", path, RELEASED_LICENCE)
        licence = None
    return {"source": str(path), "layout": layout, "licence": licence}


def _stated_beside(path: Path) -> Any:
    """Return the licence that a folder's config.json states, as timm writes it; None where there is none."""
    stated = read_config_beside(path)
    pretrained = stated.get("pretrained_cfg")
    return stated.get("license") or (pretrained.get("license") if isinstance(pretrained, dict) else None)

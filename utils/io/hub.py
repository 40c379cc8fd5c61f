"""The Hugging Face hub: the files of `hf:OWNER/NAME@REVISION`, or with timm's name `hf-hub:OWNER/NAME` (of main).

The token is huggingface_hub's (HF_TOKEN, or `hf auth login`).
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from utils.errors import UserError
from utils.io.safe_text import hide_secrets
from utils.record.logging import log

_PREFIXES = ("hf:", "hf-hub:")
# With or without a file.
_REFERENCE = re.compile(r"(?:hf:(?=.*@)|hf-hub:)([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?")
_MAX_LICENCE = 200  # characters


def is_reference(source: str) -> bool:
    """Return whether a source is on the hub."""
    return source.startswith(_PREFIXES)


def fetch(reference: str, *wanted: Sequence[str], beside: Sequence[str] = ()) -> Path:
    """Return the folder with a repository's files in the hub's cache, or the file that the reference names.

    wanted: of each, the first name that exists is fetched. beside: names that may be missing. Raises UserError, offline
    with the file to fetch.
    """
    repository, file, revision = _split(reference)
    inside = str(PurePosixPath(file).parent) if file else "."
    paths = [_fetch_first(repository, revision, names) for names in ([[file]] if file else wanted)]
    for name in beside:
        _fetch_first(repository, revision, [str(PurePosixPath(inside, name))], is_needed=False)
    name, path = paths[0]
    return path if file else path.parents[len(PurePosixPath(name).parts) - 1]


def _split(reference: str) -> tuple[str, str | None, str]:
    """Return the repository, the file and the revision of a reference."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"{reference} is no name on the hub; write hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE@REVISION, with a "
            "commit, tag or branch"
        )
    return match[1], match[2], match[3] or "main"


def stated_license(source: str | Path) -> str | None:
    """Return the licence in the model card of a repository on the hub or of a folder, or None."""
    from huggingface_hub import metadata_load

    card = Path(source, "README.md")
    if is_reference(str(source)):
        repository, _, revision = _split(str(source))
        _, card = _fetch_first(repository, revision, ["README.md"], is_needed=False) or ("", card)
    try:
        front = (metadata_load(card) if card.is_file() else None) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s is ignored (%s); a licence in it is unknown", card, error)
        return None
    licence = front.get("license_name") if front.get("license") == "other" else front.get("license")
    return licence[:_MAX_LICENCE] if isinstance(licence, str) else None


def _fetch_first(
    repository: str, revision: str, names: Sequence[str], *, is_needed: bool = True
) -> tuple[str, Path] | None:
    """Return the first of a repository's files that exists, and its path in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    is_offline = False
    for name in names:
        try:
            return name, Path(hf_hub_download(repository, name, revision=revision, local_files_only=is_offline))
        except LocalEntryNotFoundError:
            is_offline = True
        except EntryNotFoundError:
            continue
        except Exception as error:  # the libraries raise errors of many classes
            reason = hide_secrets(" ".join((str(error) or type(error).__name__).split()))
            advice = "check the name, the revision, your token and the network"
            raise UserError(f"hf:{repository}@{revision}: {reason}; {advice}") from None
    if not is_needed:
        return None
    if is_offline:
        raise UserError(
            f"hf:{repository}@{revision}: the hub cannot be reached, and {names[0]} is not in its cache; where there "
            f"is a network: hf download {repository} {names[0]} --revision {revision}, then copy the cache (HF_HOME)"
        )
    raise UserError(f"hf:{repository}@{revision} has no {' or '.join(names)}; name another repository or a file of it")

"""Models by name: a folder here, or else a repository on the Hugging Face hub.

    find("runs/small")                      the folder, where there is one
    find("sentence-transformers/all-…")     its files in the hub's cache, fetched where they are not

The hub is asked through `huggingface_hub`, an extra: `pip install 'tinygrad-llm[hub]'`. Only what
is read here is fetched: JSON, safetensors and vocabularies, no pickle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # owner/name; a few old ones have no owner

_FILES = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", "*.model"]


def find(folder: str | Path, revision: str | None = None) -> Path:
    """The folder of that path; or of the repository of that name on the hub.

    A `Path`, and a text that begins with a dot, a slash or a tilde, is never a name. What was
    fetched stays in the hub's cache, and is used as it is where there is no network.

    Args:
        revision: a branch, tag or commit of the repository; None: its main branch.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository, or none in reach: it
            says which.
    """
    if Path(folder).is_dir() or not _may_be_a_name(folder):
        return Path(folder)  # where it is not there, the reader says what is missing
    name = str(folder)
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name!r}; to fetch a model of that name from the Hugging Face "
            "hub, huggingface_hub is needed: pip install 'tinygrad-llm[hub]'"
        ) from None
    return Path(_fetch(snapshot_download, errors, name, revision))


def _may_be_a_name(folder: str | Path) -> bool:
    return isinstance(folder, str) and _NAME.fullmatch(folder) is not None


def _fetch(download: Any, errors: Any, name: str, revision: str | None) -> str:
    """The path of the repository's files in the cache."""
    try:
        return download(name, revision=revision, allow_patterns=_FILES)
    except errors.GatedRepoError:
        why = "its owner gives it to those who ask: see its page on the hub, then log in there"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        why = "the hub has none of that name, or it is private: check the spelling"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        why = "the Hugging Face hub cannot be reached, and its cache here has none: go online once"
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
    raise FileNotFoundError(f"there is no folder {name!r}, and no model of that name came: {why}")

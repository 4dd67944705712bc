"""A model of the Hub as a local folder: only the files that loading needs, at one fixed revision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from secateur.core.errors import InputError, ResourceError
from secateur.core.fetch import downloads_are_off
from secateur.models.folder_checks import INDEX, PICKLE, PICKLE_INDEX, SINGLE, shard_names

_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def is_hub_id(spec: str) -> bool:
    """Return whether `spec` is written like a Hub id: `name` or `owner/name`."""
    return re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(/[\w.-]{1,96})?", spec, re.ASCII) is not None


def snapshot(
    repository: str, revision: str | None, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Path:
    """Return the folder of one revision of a Hub model, fetched where the cache lacks it; its name is the commit.

    Configuration and tokenizer come first; the weights only after the shard index was checked, and of them only the
    ones it names. `HF_HUB_OFFLINE` keeps everything local.

    Args:
        repository: `owner/name`.
        revision: commit, branch or tag, the main branch if None.
        allow_pickle: fetch pickled weights where there are no others.
        trust_remote_code: fetch Python files too; the revision must then be a full commit.

    Raises:
        InputError: there is no such repository or revision, it may not be read, or its index is wrong.
        ResourceError: it is not in the cache, and the network is missing or switched off.
    """
    if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InputError(
            f"code of the Hub model `{repository}` is only run at a pinned revision, got {revision!r}",
            hint="pass the full commit with --revision",
        )
    folder = _fetch(repository, revision, _SMALL + (["*.py"] if trust_remote_code else []))
    commit = folder.name
    wanted = [SINGLE]
    if (folder / INDEX).exists():
        wanted = shard_names(folder / INDEX)
    _fetch(repository, commit, wanted)
    if allow_pickle and not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        pickled = shard_names(folder / PICKLE_INDEX) if (folder / PICKLE_INDEX).exists() else [PICKLE]
        _fetch(repository, commit, pickled)
    return folder


def _fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = downloads_are_off() or constants.HF_HUB_OFFLINE
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                local_files_only=offline,
            )
        )
    except GatedRepoError as error:
        raise InputError(
            f"the Hub model `{repository}` is gated", hint="accept its terms on the Hub, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"the Hub model `{repository}` has no revision `{revision}`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"`{repository}` is neither a local folder nor a model on the Hub", hint="check the name; it may be private"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # LocalEntryNotFoundError is one of the last two
        reason = "downloads are switched off" if offline else "the Hub cannot be reached"
        raise ResourceError(
            f"`{repository}` is no local folder, and as a Hub model it is not in the cache and {reason}",
            hint="unset HF_HUB_OFFLINE" if offline else "check the name and the network",
        ) from error

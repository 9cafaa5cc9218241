"""From a hub id to a folder: the hub client's own download and cache, restricted to the files that qlm reads.

When the repository has safetensors, its `.bin` files are not downloaded: they would double the size and are never read.
"""

import fnmatch
import os
import re
from pathlib import Path

from qlm.checkpoint.folder import resolve_model_folder
from qlm.errors import MissingInput, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Everything that qlm reads besides weights.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "manifest.json",
)
SAFETENSORS_FILES = ("*.safetensors", "*.safetensors.index.json")
BIN_FILES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form `org/name` and is no path."""
    return _HUB_ID.fullmatch(model) is not None and ".." not in model and "--" not in model


def download(repository: str, revision: str | None) -> Path:
    """Folder of the snapshot in the hub client's cache; from the cache alone when there is no network.

    Raises:
        MissingInput: no such repository or revision, no access, or no network and nothing in the cache.
    """
    # Imported here: it takes a third of a second and only hub ids need it.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"hub repository {repository!r}" + (f" at revision {revision!r}" if revision else "")
    cached = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("the hub client is set to offline by HF_HUB_OFFLINE")
        information = HfApi().model_info(repository, revision=revision, timeout=30)
        patterns = _patterns([file.rfilename for file in information.siblings or []])
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise MissingInput(
            f"{what}: access must be granted first; ask on its hub page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise MissingInput(f"{what}: there is no such revision") from None
    except RepositoryNotFoundError:
        raise MissingInput(
            f"{what}: no such repository, or no access to it; and no folder of that name is here"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{what}: not a hub id: {error}") from None
    except Exception as error:  # the HTTP library's errors, whose classes differ between versions of the hub client
        reason = " ".join(str(error).split())[:200]
    try:
        return resolve_model_folder(cached, revision)
    except MissingInput:
        raise MissingInput(
            f"{what}: the hub cannot be reached ({reason}), the cache {cached} does not hold it, and no folder of "
            "that name is here"
        ) from None


def _patterns(names: list[str]) -> list[str]:
    """The names to download, each as a pattern that matches itself alone."""
    plain = [name for name in names if os.sep not in name and not any(c in name for c in "*?[]")]
    weights = _matching(plain, SAFETENSORS_FILES) or _matching(plain, BIN_FILES)
    return [*_matching(plain, SMALL_FILES), *weights]


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

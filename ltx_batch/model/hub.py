"""The model hub: what a repository holds, and its files in the hub's own cache. No torch.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE hold as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.storage import FileRef, stat_uri

_TIMEOUT_S = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """`sha256` is None for small files, of which the hub knows only git's own hash."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository at one commit, to which `revision` led (None: the main branch). `licence` is what its model card says,
    None where it says nothing."""

    name: str
    revision: str | None
    commit: str
    files: Mapping[str, HubFile]
    licence: str | None = None

    @classmethod
    def look_up(cls, name: str, revision: str | None = None) -> HubRepo:
        """Ask the hub. Raises CheckpointError where it cannot be reached or does not show the repository."""
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        except Exception as error:
            raise CheckpointError(f"the model hub does not give {name}{_at(revision)}: {first_line(error)}") from error
        files = {
            one.rfilename: HubFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None)
            for one in info.siblings or ()
        }
        return cls(name, revision, str(info.sha), files, _licence(info.card_data))

    def licences(self) -> list[str]:
        """Names of the licence texts in it."""
        return [name for name in self.files if "license" in name.lower() or "licence" in name.lower()]

    def below(self, folders: tuple[str, ...]) -> list[HubFile]:
        """The files directly in these folders."""
        return [file for name, file in sorted(self.files.items()) if name.rpartition("/")[0] in folders]

    def cached(self, file: str) -> Path | None:
        """Where the hub's cache holds the file of this commit."""
        return cached_file(self.name, self.commit, file)

    def ref(self, file: str) -> FileRef:
        """For reading: in the cache, else at the hub, where the fingerprint is the sha256 if the hub knows it."""
        path = self.cached(file)
        if path is not None:
            return stat_uri(str(path))
        found = self.files[file]
        uri = f"hf://{self.name}@{self.commit}/{file}"
        return FileRef(uri, found.size, found.sha256 or f"{self.commit}/{file}")


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """Where the hub's cache holds a file of that revision, as far as it is known here: nobody is asked."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no repository can have that name
        return None
    return Path(found) if isinstance(found, str) else None


def commit_of(name: str, revision: str | None) -> str:
    """The commit that a revision means now; one that is a commit already is not asked for. Raises CheckpointError."""
    return revision if revision and _COMMIT.fullmatch(revision) else HubRepo.look_up(name, revision).commit


def download(name: str, revision: str | None, *, file: str | None = None, folders: tuple[str, ...] = ()) -> Path:
    """One file, or the folder that holds these folders, in the hub's cache; where the hub cannot be reached, what the
    cache holds of it. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    patterns = [f"{folder}/*" for folder in folders if folder] + [one for one in ("pipeline_config.yaml",) if not file]
    reasons = []
    for cached_only in (False, True):
        options: dict[str, Any] = {"revision": revision, "local_files_only": cached_only}
        try:
            if file is not None:
                return Path(hf_hub_download(name, file, **options))
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.bin"], **options))
        except Exception as error:
            reasons.append(first_line(error))
    what = f"{name}{_at(revision)}{f':{file}' if file else ''}"
    raise CheckpointError(f"there is no {what} here, and the model hub does not give it: {reasons[0]}")


def _licence(card: Any) -> str | None:
    """`other (ltx-video-open-weights, https://...)` of the model card's three fields."""
    if card is None or not card.get("license"):
        return None
    more = ", ".join(str(card.get(key)) for key in ("license_name", "license_link") if card.get(key))
    return f"{card.get('license')} ({more})" if more else str(card.get("license"))


def _at(revision: str | None) -> str:
    return f"@{revision}" if revision else ""


def first_line(error: Exception) -> str:
    """What a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

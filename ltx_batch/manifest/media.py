"""Conditioning media of a manifest: whether they are there, and the hash of their bytes."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ltx_batch.errors import MediaError, StorageRefused
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.sources import Options
from ltx_batch.request import Condition, RenderRequest
from ltx_batch.storage import exists_uri, is_local_uri, join_uri, sha256_uri

MAX_LOOKUPS = (
    100_000  # distinct files that are looked for before a run; others are found missing when their shard opens
)
_THREADS = 32
_PATHS = "conditioning_media_paths"


class MediaLookup:
    """Looks for each distinct file once."""

    def __init__(self, options: Options, *, limit: int = MAX_LOOKUPS) -> None:
        self._options, self._limit = options, limit
        self._faults: dict[str, str | None] = {}

    def missing(self, cells: Cells, folder: str) -> list[Fault]:
        """A fault for every row whose media are not there; relative paths start from `folder`."""
        if _PATHS not in cells:
            return []
        wanted = [(row, join_uri(folder, path)) for row, path in _paths(cells)]
        new = list(dict.fromkeys(uri for _, uri in wanted if uri not in self._faults))
        self._look(new[: self._limit - len(self._faults)])
        return [Fault(row, _PATHS, fault) for row, uri in wanted if (fault := self._faults.get(uri))]

    def _look(self, uris: list[str]) -> None:
        if not uris:
            return
        if all(is_local_uri(uri) for uri in uris):
            self._faults |= {uri: self._fault(uri) for uri in uris}
            return
        with ThreadPoolExecutor(_THREADS) as threads:
            self._faults |= dict(zip(uris, threads.map(self._fault, uris), strict=True))

    def _fault(self, uri: str) -> str | None:
        try:
            return None if exists_uri(uri, self._options) else f"there is no file {uri}"
        except (OSError, StorageRefused) as error:
            return f"{uri} cannot be looked for: {error}"


def hash_media(
    request: RenderRequest, options: Options = None, cache: MutableMapping[str, str] | None = None
) -> RenderRequest:
    """The request with the sha256 of every conditioning file; a hash that the manifest gave is kept unchecked.

    `cache` maps URIs to hashes and is filled, so that a file of many rows is read once. Raises MediaError.
    """
    if all(condition.media_sha256 for condition in request.conditions):
        return request
    known = {} if cache is None else cache
    conditions = tuple(_hashed(condition, options, known) for condition in request.conditions)
    return replace(request, conditions=conditions)


def _hashed(condition: Condition, options: Options, cache: MutableMapping[str, str]) -> Condition:
    if condition.media_sha256 is not None or not isinstance(condition.media, str):
        return condition
    uri = condition.media
    if uri not in cache:
        try:
            cache[uri] = sha256_uri(uri, options)
        except FileNotFoundError:
            raise MediaError(f"there is no file {uri}") from None
        except (OSError, StorageRefused) as error:
            raise MediaError(f"{uri} cannot be read: {error}") from error
    return replace(condition, media_sha256=cache[uri])


def _paths(cells: Cells) -> Iterator[tuple[int, str]]:
    """Row and path of every medium that a row without faults in this column names."""
    lists = cells.array(_PATHS).to_pylist()
    sound = ~cells.bad(_PATHS)
    return ((row, path) for row, paths in enumerate(lists) if sound[row] for path in paths or ())

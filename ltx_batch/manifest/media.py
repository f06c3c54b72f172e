"""Conditioning and input media of a manifest: whether they are there, and the hash of their bytes."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ltx_batch.errors import MediaError, StorageRefused
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.sources import Options
from ltx_batch.request import Condition, RenderRequest
from ltx_batch.storage import exists_uri, is_local_uri, join_uri, sha256_uri

MAX_LOOKUPS = (
    100_000  # distinct files that are looked for before a run; others are found missing when their shard opens
)
_THREADS = 32
PATHS = "conditioning_media_paths"
INPUT = "input_media_path"


class MediaLookup:
    """Looks for each distinct file once."""

    def __init__(self, options: Options, *, limit: int = MAX_LOOKUPS) -> None:
        self._options, self._limit = options, limit
        self._faults: dict[str, str | None] = {}

    def missing(self, cells: Cells, folder: str) -> list[Fault]:
        """A fault for every row whose media are not there; relative paths start from `folder`."""
        wanted = [(row, name, join_uri(folder, path)) for row, name, path in (*paths_of(cells), *inputs_of(cells))]
        new = list(dict.fromkeys(uri for _, _, uri in wanted if uri not in self._faults))
        self._look(new[: self._limit - len(self._faults)])
        return [Fault(row, name, fault) for row, name, uri in wanted if (fault := self._faults.get(uri))]

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
    """The request with the sha256 of every conditioning and input file; a hash that the manifest gave is kept unchecked.

    `cache` maps URIs to hashes and is filled, so that a file of many rows is read once. Raises MediaError.
    """
    known = {} if cache is None else cache
    conditions = tuple(_hashed(condition, options, known) for condition in request.conditions)
    begin = request.input_media
    return replace(request, conditions=conditions, input_media=begin and _hashed(begin, options, known))


def _hashed(condition: Condition, options: Options, cache: MutableMapping[str, str]) -> Condition:
    if condition.media_sha256 is not None or not isinstance(condition.media, str):
        return condition
    uri = condition.media
    sha256 = cache.get(uri)  # asked once: another thread may push it out of the cache
    if sha256 is None:
        try:
            sha256 = cache[uri] = sha256_uri(uri, options)
        except FileNotFoundError:
            raise MediaError(f"there is no file {uri}") from None
        except (OSError, StorageRefused) as error:
            raise MediaError(f"{uri} cannot be read: {error}") from error
    return replace(condition, media_sha256=sha256)


def paths_of(cells: Cells) -> Iterator[tuple[int, str, str]]:
    """Row, column and path of every conditioning medium that a row without faults in this column names."""
    if PATHS in cells:
        lists = cells.array(PATHS).to_pylist()
        for row in np.flatnonzero(~cells.bad(PATHS)):
            yield from ((int(row), PATHS, path) for path in lists[row] or ())


def inputs_of(cells: Cells) -> Iterator[tuple[int, str, str]]:
    """The same for the media of video to video."""
    if INPUT in cells:
        paths = cells.array(INPUT).to_pylist()
        sound = cells.present(INPUT) & ~cells.bad(INPUT)
        yield from ((int(row), INPUT, paths[row]) for row in np.flatnonzero(sound))

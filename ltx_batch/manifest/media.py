"""Conditioning and input media of a manifest: whether they are there and can serve, and the hash of their bytes."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ltx_batch.errors import MediaError, StorageRefused
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.sources import Options
from ltx_batch.request import Condition, RenderRequest
from ltx_batch.storage import exists_uri, is_local_uri, join_uri, open_uri, sha256_uri

MAX_LOOKUPS = (
    100_000  # distinct files that are looked for before a run; others are found missing when their shard opens
)
_THREADS = 32
_PATHS = "conditioning_media_paths"
_INPUT = "input_media_path"
_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class MediaLookup:
    """Looks for each distinct file once."""

    def __init__(self, options: Options, *, limit: int = MAX_LOOKUPS) -> None:
        self._options, self._limit = options, limit
        self._faults: dict[str, str | None] = {}
        self._stills: dict[str, bool] = {}

    def missing(self, cells: Cells, folder: str) -> list[Fault]:
        """A fault for every row whose media are not there; relative paths start from `folder`."""
        wanted = [(row, name, join_uri(folder, path)) for row, name, path in (*_paths(cells), *_inputs(cells))]
        new = list(dict.fromkeys(uri for _, _, uri in wanted if uri not in self._faults))
        self._look(new[: self._limit - len(self._faults)])
        return [Fault(row, name, fault) for row, name, uri in wanted if (fault := self._faults.get(uri))]

    def stills(self, cells: Cells, folder: str, num_frames: int) -> list[Fault]:
        """A fault for every row that makes a video of a picture: video to video needs as many frames as the clip has.

        `num_frames` is what rows without their own have. Only local pictures are opened; videos are counted when rendered.
        """
        frames = cells.numbers("num_frames", default=num_frames)
        inputs = ((row, join_uri(folder, path)) for row, _, path in _inputs(cells) if frames[row] > 1)
        rule = "is a picture, and the clip has {} frames: give a video as long as the clip, or num_frames 1"
        return [Fault(row, _INPUT, rule.format(int(frames[row]))) for row, uri in inputs if self._is_still(uri)]

    def _is_still(self, uri: str) -> bool:
        if not uri.lower().endswith(_PICTURES) or not is_local_uri(uri):
            return False
        if uri not in self._stills and len(self._stills) < self._limit:
            self._stills[uri] = _one_frame(uri)
        return self._stills.get(uri, False)

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


def _one_frame(uri: str) -> bool:
    """Whether a local file is a picture that does not move. One that cannot be read is told of when it is rendered."""
    from PIL import Image

    try:
        with open_uri(uri) as file, Image.open(file) as image:
            return getattr(image, "n_frames", 1) == 1
    except (OSError, SyntaxError, ValueError):
        return False


def _paths(cells: Cells) -> Iterator[tuple[int, str, str]]:
    """Row, column and path of every conditioning medium that a row without faults in this column names."""
    if _PATHS in cells:
        lists = cells.array(_PATHS).to_pylist()
        for row in np.flatnonzero(~cells.bad(_PATHS)):
            yield from ((int(row), _PATHS, path) for path in lists[row] or ())


def _inputs(cells: Cells) -> Iterator[tuple[int, str, str]]:
    """The same for the media of video to video."""
    if _INPUT in cells:
        paths = cells.array(_INPUT).to_pylist()
        sound = cells.present(_INPUT) & ~cells.bad(_INPUT)
        yield from ((int(row), _INPUT, paths[row]) for row in np.flatnonzero(sound))

"""LoRA files of a job and its rows: the rules of their column, whether they are there and fit, and their hashes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ltx_batch.errors import CheckpointError, LoraError, StorageRefused
from ltx_batch.job import JobSpec
from ltx_batch.lora import Shapes, open_lora
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.sources import Options
from ltx_batch.request import LoraRef, RenderRequest, parse_lora
from ltx_batch.storage import is_local_uri, join_uri, sha256_uri

NAME = "loras"
MAX_LOOKUPS = 10_000  # distinct files whose headers are read before a run
_THREADS = 32


def check_loras(cells: Cells) -> None:
    """Flag entries that are no `PATH` or `PATH:WEIGHT`, and rows that name a file twice."""
    if NAME not in cells:
        return
    entries = pc.list_flatten(cells.array(NAME))
    cells.flag_entries(NAME, np.asarray(pc.is_null(entries)), "has a null entry")
    distinct = pc.dictionary_encode(entries.drop_null()).dictionary.to_pylist()
    paths: dict[str, str] = {}
    broken: dict[str, set[str]] = defaultdict(set)
    for text in distinct:
        try:
            paths[text] = str(parse_lora(text).path)
        except ValueError as error:
            broken[str(error)].add(text)
    for rule, texts in broken.items():
        cells.flag_entries(NAME, np.asarray(pc.is_in(entries, pa.array(sorted(texts), pa.string()))), rule)
    named = [(row, paths.get(text)) for row, text in zip(_rows_of(cells), entries.to_pylist(), strict=True)]
    cells.flag_entries(NAME, _repeated(named), "names a file twice: give it once, with the sum of the weights")


class LoraLookup:
    """Reads the header of each distinct file once."""

    def __init__(self, options: Options, layers: Callable[[], Shapes | None], *, limit: int = MAX_LOOKUPS) -> None:
        self._options, self._limit = options, limit
        self._layers = functools.cache(layers)  # asked for when there is a file to hold against them
        self._faults: dict[str, str | None] = {}
        self.unfitted = False  # there was a file, and no layers to hold it against

    def faults(self, cells: Cells, folder: str) -> list[Fault]:
        """A fault for every row and file that is missing, is no LoRA or does not fit; paths start from `folder`."""
        if NAME not in cells:
            return []
        lists, sound = cells.array(NAME).to_pylist(), ~cells.bad(NAME)
        uris = {text: loras_of([text], folder)[0].path for row in np.flatnonzero(sound) for text in lists[row] or ()}
        self.look([str(uri) for uri in uris.values()])
        return [
            Fault(int(row), NAME, fault)
            for row in np.flatnonzero(sound)
            for text in lists[row] or ()
            if (fault := self._faults.get(str(uris[text])))
        ]

    def look(self, uris: Sequence[str]) -> list[str]:
        """What is wrong with these files."""
        new = list(dict.fromkeys(uri for uri in uris if uri not in self._faults))[: self._limit - len(self._faults)]
        with ThreadPoolExecutor(1 if all(map(is_local_uri, new)) else _THREADS) as threads:
            self._faults |= dict(zip(new, threads.map(self._fault, new), strict=True))
        return [fault for uri in dict.fromkeys(uris) if (fault := self._faults.get(uri))]

    def _fault(self, uri: str) -> str | None:
        try:
            file = open_lora(uri, self._options)
        except LoraError as error:
            return str(error)
        shapes = self._layers()
        self.unfitted = self.unfitted or shapes is None
        misfits = [] if shapes is None else file.misfits(shapes)
        return f"{uri}: {'; '.join(misfits)}" if misfits else None


def loras_of(entries: Sequence[str], folder: str) -> tuple[LoraRef, ...]:
    """A row's entries as references; relative paths start from `folder`."""
    found = map(parse_lora, entries)
    return tuple(replace(lora, path=join_uri(folder, str(lora.path))) for lora in found)


def job_loras(job: JobSpec) -> tuple[LoraRef, ...]:
    """What rows get that do not say: the job's own files; relative paths start from the working directory."""
    return tuple(LoraRef(join_uri(".", lora.path), lora.weight) for lora in job.model.loras)


def check_files(loras: Sequence[LoraRef], lookup: LoraLookup, *, name: str = "model.loras") -> None:
    """Raises CheckpointError with every file that is missing, is no LoRA, does not fit or is there twice."""
    uris = [str(lora.path) for lora in loras]
    twice = [
        f"{uri} is named twice: give it once, with the sum of the weights"
        for uri in dict.fromkeys(uris)
        if uris.count(uri) > 1
    ]
    if faults := lookup.look(uris) + twice:
        raise CheckpointError("\n".join(f"{name}: {fault}" for fault in faults))


def hash_loras(
    loras: Sequence[LoraRef], options: Options = None, cache: MutableMapping[str, str] | None = None
) -> tuple[LoraRef, ...]:
    """The references with the sha256 of their files. `cache` maps URIs to hashes and is filled.

    Raises LoraError with every file that cannot be read.
    """
    known = {} if cache is None else cache
    hashes: dict[str, str] = {}
    faults: list[str] = []
    for uri in dict.fromkeys(str(lora.path) for lora in loras if lora.sha256 is None):
        try:
            hashes[uri] = known[uri] = known.get(uri) or _hash(uri, options)
        except LoraError as error:
            faults.append(str(error))
    if faults:
        raise LoraError("; ".join(faults))
    return tuple(lora if lora.sha256 else replace(lora, sha256=hashes[str(lora.path)]) for lora in loras)


def with_lora_hashes(
    request: RenderRequest, options: Options = None, cache: MutableMapping[str, str] | None = None
) -> RenderRequest:
    """The request with every LoRA file hashed. Raises LoraError."""
    return replace(request, loras=hash_loras(request.loras, options, cache)) if request.loras else request


def _hash(uri: str, options: Options) -> str:
    try:
        return sha256_uri(uri, options)
    except FileNotFoundError:
        raise LoraError(f"there is no file {uri}") from None
    except (OSError, StorageRefused) as error:
        raise LoraError(f"{uri} cannot be read: {error}") from error


def _rows_of(cells: Cells) -> list[int]:
    """The row of each entry of the flattened lists."""
    rows: list[int] = pc.list_parent_indices(cells.array(NAME)).to_pylist()
    return rows


def _repeated(named: Sequence[tuple[int, str | None]]) -> np.ndarray:
    """Which (row, path) were there before; None is no path."""
    seen: set[tuple[int, str | None]] = set()
    wrong = np.zeros(len(named), bool)
    for place, entry in enumerate(named):
        wrong[place] = entry[1] is not None and entry in seen
        seen.add(entry)
    return wrong

"""Connections to object stores: which filesystem serves a URI, which faults pass, and what the others mean."""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import IncompleteRead
from typing import Any, NoReturn, TypeVar

from ltx_batch.errors import StorageRefused

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
T = TypeVar("T")

_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: S3's answer to two conditional writes at once
_TRIES = 5
_FIRST_WAIT_S = 0.2


def scheme(uri: str) -> str:
    """`s3` of `s3://bucket/key`; `file` for a local path."""
    found = _SCHEME.match(uri)
    name = found.group(1).lower() if found else "file"
    return "file" if name == "local" else name


def filesystem(uri: str, options: Mapping[str, Any] | None = None) -> Any:
    """The fsspec filesystem of a remote URI.

    fsspec keeps one per process, thread-safe, and starts afresh after a fork: so this is called for each operation and
    its answer is never stored. `options` go to object stores; plain web servers get none of them.
    """
    import fsspec

    name = scheme(uri)
    if name in ("gs", "gcs"):  # gcsfs else asks each bucket for its kind first, for up to a minute on some servers
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    keywords = {} if name in ("http", "https") else dict(options or {})
    try:
        return fsspec.filesystem(name, use_listings_cache=False, **keywords)
    except ImportError as error:
        extra = _EXTRAS.get(name)
        cure = f'pip install "ltx-batch[{extra}]"' if extra else str(error)
        raise StorageRefused(f"{uri}: the library for {name}:// is not installed; {cure}") from error
    except ValueError as error:
        raise StorageRefused(f"{uri}: {error}; use a local path, s3://, gs:// or az://") from error


def strip(uri: str, options: Mapping[str, Any] | None = None) -> str:
    """The path by which `filesystem(uri)` knows it."""
    path = filesystem(uri, options)._strip_protocol(uri)
    return str(path)


def patiently(uri: str, operation: Callable[[], T]) -> T:
    """Run a remote operation; try again, with jittered waits, while its fault is one that passes.

    The store's own client may have repeated the request already, so that a create-only write may meet its own success.
    Raises FileNotFoundError, FileExistsError or PermissionError with the URI in the message, StorageRefused for a store
    that cannot be used at all, and the last fault once patience is out.
    """
    tries = 0
    while True:
        try:
            return operation()
        except Exception as error:
            tries += 1
            if tries == _TRIES or not _passes(error):
                _raise_explained(uri, error)
        time.sleep(_FIRST_WAIT_S * 2 ** (tries - 1) * random.uniform(0.5, 1.5))


def _raise_explained(uri: str, error: Exception) -> NoReturn:
    """The same fault with the URI in its message; libraries say "The specified key does not exist." and no more."""
    if _exists_already(error):
        raise FileExistsError(uri) from error
    if refused := _refusal(uri, error):
        raise refused from error
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(f"{uri}: {error}") from error
    if isinstance(error, PermissionError):
        raise PermissionError(f"{uri}: {error}") from error
    raise error


def _refusal(uri: str, error: Exception) -> StorageRefused | None:
    """What to tell a user whose store cannot be used at all; None for a fault of one object."""
    place = "/".join(uri.split("/")[:3])
    if any(type(fault).__name__ in ("NoCredentialsError", "PartialCredentialsError") for fault in _causes(error)):
        return StorageRefused(
            f"{place}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, "
            "or `storage.options: {anon: true}` for a public bucket"
        )
    if _code(error) == "NoSuchBucket":
        return StorageRefused(f"{place}: there is no such bucket; create it, or mend the name")
    return None


def _exists_already(error: Exception) -> bool:
    """Whether a create-only write was refused because the name is taken (HTTP 412, under any library's name)."""
    return isinstance(error, FileExistsError) or _status(error) == 412


def _passes(error: Exception) -> bool:
    if isinstance(error, FileExistsError | FileNotFoundError | PermissionError):
        return False
    kinds: tuple[type[BaseException], ...] = (TimeoutError, ConnectionError, IncompleteRead)
    for module, name in (("botocore.exceptions", "HTTPClientError"), ("aiohttp", "ClientConnectionError")):
        if module in sys.modules:
            kinds += (getattr(sys.modules[module], name),)
    return _status(error) in _TRANSIENT_STATUS or any(isinstance(fault, kinds) for fault in _causes(error))


def _causes(error: BaseException | None) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    """HTTP status behind an error of botocore, gcsfs (`code`), aiohttp (`status`) or azure (`status_code`)."""
    for fault in _causes(error):
        response = getattr(fault, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status_code", "status", "code"):
            if isinstance(status := getattr(fault, name, None), int):
                return status
    return None


def _code(error: Exception) -> str | None:
    for fault in _causes(error):
        response = getattr(fault, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code")
    return None

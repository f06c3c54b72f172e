"""Files on their way into the system's page cache while this process does something else. No torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_BLOCK_BYTES = 2**22


@contextmanager
def read_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Read `files` in order, and drop what is read, until the body has ended.

    A worker's libraries take as long to import as ten gigabytes to come from a disk. What is not there any more, or has no
    room in the cache, costs nothing but the reading.
    """
    ended = threading.Event()

    def read() -> None:
        block = bytearray(_BLOCK_BYTES)
        for file in files:
            with suppress(OSError), file.open("rb", buffering=0) as stream:
                while not ended.is_set() and stream.readinto(block):
                    pass

    reader = threading.Thread(target=read, name="read-ahead", daemon=True)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join()

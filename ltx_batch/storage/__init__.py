"""The one door to files, local or in an object store. Nothing else imports fsspec.

`Storage` is the output prefix, with the few promises that the ledger is built on: writes that are whole or absent, and
create-only writes that one of many racing writers wins. The other functions read URIs anywhere.
"""

from ltx_batch.storage.hashes import sha256_uri
from ltx_batch.storage.prefix import Storage
from ltx_batch.storage.uri import (
    FileRef,
    exists_uri,
    expand,
    fetch_uri,
    is_local_uri,
    is_relative,
    join_uri,
    open_uri,
    read_uri,
    stat_uri,
)

__all__ = [
    "FileRef",
    "Storage",
    "exists_uri",
    "expand",
    "fetch_uri",
    "is_local_uri",
    "is_relative",
    "join_uri",
    "open_uri",
    "read_uri",
    "sha256_uri",
    "stat_uri",
]

"""A manifest and its media in an object store."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from manifest_files import DEFAULTS, FORMATS, resolve, write
from servers import S3Server

from ltx_batch.errors import ManifestError, MediaError
from ltx_batch.job import JobSpec
from ltx_batch.manifest import Manifest, hash_media, validate
from ltx_batch.storage import Storage

PATHS, FRAMES = "conditioning_media_paths", "conditioning_start_frames"


@pytest.mark.parametrize("kind", FORMATS)
def test_read_validate_and_hash_from_s3(s3_server: S3Server, tmp_path: Path, kind: str) -> None:
    prefix = s3_server.uri("prompts")
    store = Storage(prefix)
    store.create("m/a.png", b"picture")
    rows = [{"prompt": f"a {n}", "row_id": f"r{n}", PATHS: None, FRAMES: None} for n in range(100)]
    rows[7] |= {PATHS: ["m/a.png"], FRAMES: [0]}
    rows[60] |= {PATHS: ["m/gone.png"], FRAMES: [0]}
    for part in range(2):
        half = rows[50 * part : 50 * part + 50]
        store.upload(write(tmp_path, half, kind, name=f"part-{part}", group=20), f"part-{part}.{kind}")

    for uri in (prefix, f"{prefix}/part-*.{kind}"):
        manifest = Manifest.open(uri)
        assert [ref.uri for ref in manifest.files] == [f"{prefix}/part-{part}.{kind}" for part in range(2)]
        assert [part["rows"] for part in manifest.fingerprint()] == [50, 50]
        found = validate(manifest, JobSpec(manifest=uri, output="unused"), tokenizer=None)
        assert [(issue.file, issue.row, issue.rule) for issue in found.errors] == [
            (f"{prefix}/part-1.{kind}", 10, f"there is no file {prefix}/m/gone.png")
        ]
    resolved = resolve(prefix, defaults=DEFAULTS, shard_rows=9)
    assert [row.row_id for row in resolved] == [row["row_id"] for row in rows]
    there, gone = resolved[7].request, resolved[60].request
    assert there is not None and gone is not None
    assert hash_media(there).conditions[0].media_sha256 == hashlib.sha256(b"picture").hexdigest()
    with pytest.raises(MediaError, match="there is no file s3://"):
        hash_media(gone)


def test_nothing_there(s3_server: S3Server) -> None:
    with pytest.raises(ManifestError, match="there is no manifest"):
        Manifest.open(s3_server.uri("nothing"))

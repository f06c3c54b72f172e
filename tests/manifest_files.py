"""Write the same rows as Parquet, CSV and JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ltx_batch.job import RowDefaults
from ltx_batch.manifest import Manifest, Row, resolve_rows

FORMATS = ("parquet", "csv", "jsonl")
DEFAULTS = RowDefaults(height=128, width=128, num_frames=17, frame_rate=16)


def write(folder: Path, rows: Sequence[dict[str, Any]], kind: str, *, name: str = "rows", group: int = 1000) -> Path:
    path = folder / f"{name}.{kind}"
    {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}[kind](path, rows, group)
    return path


def resolve(path: Path | str, *, defaults: RowDefaults = DEFAULTS, shard_rows: int = 512) -> list[Row]:
    manifest = Manifest.open(str(path))
    return [
        row
        for shard in manifest.shards(shard_rows)
        for row in resolve_rows(manifest.read(shard), manifest=manifest, shard=shard, defaults=defaults)
    ]


def write_animation(path: Path, count: int) -> Path:
    """`count` frames, no two alike, in a format that Pillow writes: .webp or .gif."""
    first, *others = (Image.new("RGB", (16, 16), (10 * n % 256, n, 255 - n)) for n in range(count))
    first.save(path, save_all=True, append_images=others, lossless=True)
    return path


def _parquet(path: Path, rows: Sequence[dict[str, Any]], group: int) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, path, row_group_size=group)


def _csv(path: Path, rows: Sequence[dict[str, Any]], group: int) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})


def _jsonl(path: Path, rows: Sequence[dict[str, Any]], group: int) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""Manifests: Parquet, CSV or JSONL files whose rows become render requests."""

from ltx_batch.manifest.columns import COLUMNS, Column
from ltx_batch.manifest.read import Manifest, Shard
from ltx_batch.manifest.rows import Row, resolve_rows, seed_of

__all__ = ["COLUMNS", "Column", "Manifest", "Row", "Shard", "resolve_rows", "seed_of"]

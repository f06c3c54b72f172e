"""Manifests: Parquet, CSV or JSONL files whose rows become render requests."""

from ltx_batch.manifest.columns import COLUMNS, Column
from ltx_batch.manifest.loras import hash_loras, job_loras, with_lora_hashes
from ltx_batch.manifest.media import hash_media
from ltx_batch.manifest.read import Manifest, Shard
from ltx_batch.manifest.rows import Row, resolve_rows, seed_of
from ltx_batch.manifest.single import resolve_single
from ltx_batch.manifest.validation import Validation, validate

__all__ = [
    "COLUMNS",
    "Column",
    "Manifest",
    "Row",
    "Shard",
    "Validation",
    "hash_loras",
    "hash_media",
    "job_loras",
    "resolve_rows",
    "resolve_single",
    "seed_of",
    "validate",
    "with_lora_hashes",
]

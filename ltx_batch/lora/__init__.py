"""LoRA files: what one holds, whether it fits a model, and fetching them. No torch."""

from ltx_batch.lora.cache import LoraCache
from ltx_batch.lora.file import LoraFile, LoraLayer, Shapes, open_lora, parse_lora_file, shapes_in, some
from ltx_batch.lora.names import diffusers_name

__all__ = [
    "LoraCache",
    "LoraFile",
    "LoraLayer",
    "Shapes",
    "diffusers_name",
    "open_lora",
    "parse_lora_file",
    "shapes_in",
    "some",
]

"""One row that no manifest holds, as a command line gives it: the same columns, the same rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from ltx_batch.job import RowDefaults
from ltx_batch.lora import Shapes
from ltx_batch.manifest.cells import Fault
from ltx_batch.manifest.loras import LoraLookup
from ltx_batch.manifest.media import MediaLookup
from ltx_batch.manifest.plans import PlanLookup, Planner
from ltx_batch.manifest.rows import request_of
from ltx_batch.manifest.rules import check, in_order
from ltx_batch.request import RenderRequest

_HERE = "."


def resolve_single(
    values: Mapping[str, Any],
    defaults: RowDefaults,
    *,
    layers: Callable[[], Shapes | None] = lambda: None,
    planner: Planner | None = None,
) -> tuple[RenderRequest | None, list[Fault]]:
    """The request that `values`, by column, come to; or None, and every rule that they break.

    Relative paths start from the working directory. `layers` and `planner` are those of `validate`.
    """
    # Texts, as in a CSV file: what does not fit its column is then a fault like any other.
    texts = {name: [value if isinstance(value, str) else json.dumps(value)] for name, value in values.items()}
    cells, broken = check(pa.table(texts), defaults)
    looked_for = [
        *MediaLookup(None).missing(cells, _HERE),
        *LoraLookup(None, layers).faults(cells, _HERE),
        *PlanLookup(planner, defaults).faults(cells),
    ]
    if faults := in_order(broken + looked_for):
        return None, faults
    row = {name: array[0].as_py() for name, array in cells.arrays.items()}
    return request_of(row, _HERE, defaults, ()), []

"""YAML as this project's files are written: a mapping whose keys are there once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml


class DuplicateKeys(yaml.YAMLError):
    """Keys that a mapping has more than once. YAML forbids it, and PyYAML keeps the last one without a word."""


def parse_yaml(text: str | bytes) -> Any:
    """The values of one YAML document. Raises yaml.YAMLError, and DuplicateKeys with every repeated key and its lines."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        faults = list(_repeated(node, (), set()))
        if faults:
            raise DuplicateKeys("; ".join(faults))
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _repeated(node: yaml.Node | None, path: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """`line 9: model.precision is there already, in line 7`. `seen` ends the walk of a node that holds itself."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for place, entry in enumerate(node.value):
            yield from _repeated(entry, (*path, str(place)), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            yield f"line {line}: {'.'.join((*path, name))} is there already, in line {lines[name]}"
        lines.setdefault(name, line)
        yield from _repeated(value, (*path, name), seen)

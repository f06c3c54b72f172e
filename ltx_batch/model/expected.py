"""What the recipe of a run says of its files, held against the files that are loaded on this machine. No torch."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.model.fetch import file_hash
from ltx_batch.model.pipeline_config import PassConfig, PipelineConfig
from ltx_batch.model.sources import Sources
from ltx_batch.model.text_key import is_text
from ltx_batch.request import canonical
from ltx_batch.storage import FileRef

Reading = Callable[[], AbstractContextManager[None]]
_HASHED_AT_ONCE = 4
_ADVICE = (
    "Weights changed after the run began, or differ from machine to machine: bring the files of the recipe back, or start "
    "the job again, which then is another run under other keys"
)

# What changes a picture beside the passes.
_OF_ALL_PASSES = {
    *("pipeline_type", "downscale_factor", "stg_mode", "sampler", "stochastic_sampling"),
    *("decode_timestep", "decode_noise_scale", "image_cond_noise_scale"),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """`sha256` is what a recipe says of each file, by its name below the checkpoint; None: there is no recipe to keep to.
    `local` says where the files lie on this machine."""

    sha256: Mapping[str, str] | None
    local: Sources

    @classmethod
    def of(
        cls,
        recipe: Mapping[str, Any] | None,
        sources: Sources,
        checkpoint: Path,
        text_encoder: Path | CheckpointError | None,
        upsampler: Path | None,
    ) -> Expected:
        """What `recipe` says of `sources`, which were brought to these places; a text encoder may not be to be had."""
        encoder = text_encoder if isinstance(text_encoder, Path) else None
        local = sources.at(checkpoint, text_encoder=encoder, upsampler=upsampler)
        return cls(None if recipe is None else recipe["checkpoint"]["files"], local)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """For reading all but the text encoder. Raises CheckpointError unless the files are the recipe's and stay as they
        are: they are looked at before and after, and hashed meanwhile. What the hashes say comes before what came of it."""
        with self._checked(lambda name: not is_text(name)):
            yield

    @contextmanager
    def text(self) -> Iterator[None]:
        """The same for reading text encoder and tokenizer."""
        with self._checked(is_text):
            yield

    @contextmanager
    def _checked(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        if self.sha256 is None:
            yield
            return
        before = self._found(wanted)
        with ThreadPoolExecutor(1) as beside:
            hashed = beside.submit(self._check, wanted, before)
            try:
                yield
            except Exception:
                hashed.result()
                raise
            else:
                hashed.result()
            finally:
                del hashed  # which holds its error, and that this frame
        after = self._found(wanted)
        if after != before:
            self._check(wanted, after)
            changed = sorted(name for name in after if after[name] != before.get(name))
            raise CheckpointError(
                f"on {socket.gethostname()}: {', '.join(changed)} changed while they were read: let the copy end, and start again"
            )

    def _found(self, wanted: Callable[[str], bool]) -> dict[str, FileRef]:
        return {name: ref for name, ref in self.local.files().items() if wanted(name)}

    def _check(self, wanted: Callable[[str], bool], found: Mapping[str, FileRef]) -> None:
        expected = {name: sha256 for name, sha256 in (self.sha256 or {}).items() if wanted(name)}
        faults = [f"{name} is missing at {self.local.checkpoint}" for name in sorted(expected.keys() - found.keys())]
        faults += [
            f"{found[name].uri} is there, and the recipe has no such file" for name in found if name not in expected
        ]
        both = [name for name in expected if name in found]
        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            faults += filter(
                None, pool.map(_differs, [found[name] for name in both], [expected[name] for name in both])
            )
        if faults:
            raise CheckpointError(f"on {socket.gethostname()}: {'; '.join(faults)}. {_ADVICE}")


def config_sha256(config: PipelineConfig) -> str:
    """Hex sha256 of the values that change a picture, however the file is written.

    Where weights lie is not among them, since their own hashes stand in a recipe; nor is the precision, which stands there
    by its resolved name. A value at its default is left out, so that a later version with new ones gives the same.
    """
    values = config.model_dump(include=_OF_ALL_PASSES, exclude_defaults=True)
    if config.pipeline_type == "base":
        values.pop("downscale_factor", None)
    of_a_pass = set(PassConfig.model_fields)
    values["passes"] = [one.model_dump(include=of_a_pass, exclude_defaults=True) for one in config.passes]
    return hashlib.sha256(json.dumps(canonical(values), sort_keys=True).encode()).hexdigest()


def check_config(recipe: Mapping[str, Any], named: str, config: PipelineConfig) -> None:
    """Raises CheckpointError where the config of that name is not the one that the recipe was made with."""
    found, expected = config_sha256(config), recipe["pipeline_config"]
    if found != expected:
        raise CheckpointError(
            f"on {socket.gethostname()}: the values of the pipeline config {named} have sha256 {found}, and the recipe of this "
            f"run says {expected}. It changed after the run began: bring it back, or start the job again"
        )


def _differs(ref: FileRef, expected: str) -> str | None:
    found = file_hash(ref)
    return None if found == expected else f"{ref.uri} has sha256 {found}, and the recipe of this run says {expected}"

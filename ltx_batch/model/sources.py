"""Where the parts of a model come from: one checkpoint, and perhaps a text encoder and an upscaler of their own. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.model.catalog import TEXT_ENCODER, TEXT_FOLDERS
from ltx_batch.model.fetch import (
    COMPONENTS,
    SCHEDULER_FILE,
    SINGLE_FILE,
    UPSAMPLER_FOLDERS,
    checkpoint_files,
    file_hash,
    local_checkpoint,
    locate,
    pin,
)
from ltx_batch.model.pipeline_config import FILE_NAME, PipelineConfig, load_pipeline_config
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.single_file import read_checkpoint_file
from ltx_batch.model.text_key import is_text
from ltx_batch.storage import FileRef, is_local_uri, read_uri
from ltx_batch.tensor_file import read_tensor_file

Options = Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Sources:
    """Names that `locate` knows. None: the checkpoint itself has the part; a base pipeline needs no upscaler. `own_config`:
    the pipeline config in the checkpoint's folder holds, not one that is named."""

    checkpoint: str
    text_encoder: str | None = None
    upsampler: str | None = None
    own_config: bool = True

    def files(self, options: Options = None) -> dict[str, FileRef]:
        """Every file that changes the picture, by its name below the checkpoint, wherever it lies. Raises CheckpointError.

        Nothing large is downloaded.
        """
        found = checkpoint_files(self.checkpoint, options)
        if not self.own_config:
            found.pop(FILE_NAME, None)
        if self.text_encoder is not None:
            found = {path: ref for path, ref in found.items() if not is_text(path)} | self.text_files(options)
        if self.upsampler is not None:
            found = {path: ref for path, ref in found.items() if path.partition("/")[0] not in UPSAMPLER_FOLDERS}
            parts = checkpoint_files(self.upsampler, options, folders=UPSAMPLER_FOLDERS)
            parts.pop(FILE_NAME, None)
            found |= {
                "latent_upsampler.safetensors" if path == SINGLE_FILE else path: ref for path, ref in parts.items()
            }
        return found

    def text_files(self, options: Options = None) -> dict[str, FileRef]:
        """The files of text encoder and tokenizer. Raises CheckpointError, with what to set."""
        with _advised():
            files = checkpoint_files(self.text_encoder or self.checkpoint, options, folders=TEXT_FOLDERS)
        return {path: ref for path, ref in files.items() if is_text(path)}

    def hashes(self, options: Options = None) -> dict[str, str]:
        """sha256 of each of `files`; the hub's own hashes serve. Raises CheckpointError."""
        return _hashes(self.files(options), options)

    def text_hashes(self, options: Options = None) -> dict[str, str]:
        """sha256 of each of `text_files`. Raises CheckpointError."""
        return _hashes(self.text_files(options), options)

    def schedule(self, options: Options = None) -> SchedulerConfig:
        """The checkpoint's scheduler; of a single file only the header is read. Raises CheckpointError."""
        files = checkpoint_files(self.checkpoint, options)
        if SINGLE_FILE in files:
            return read_checkpoint_file(read_tensor_file(files[SINGLE_FILE].uri, options)).scheduler
        if SCHEDULER_FILE not in files:
            raise CheckpointError(f"{self.checkpoint} lacks {SCHEDULER_FILE}; it holds {', '.join(sorted(files))}")
        return SchedulerConfig.parse(read_uri(files[SCHEDULER_FILE].uri, options), source=SCHEDULER_FILE)

    def weights_here(self, *, with_text: bool) -> list[Path]:
        """Files of weights that are named by a path of this machine, in the order in which they are loaded."""
        places = [(self.checkpoint, self._own), (self.upsampler, UPSAMPLER_FOLDERS), (self.text_encoder, TEXT_FOLDERS)]
        found: list[tuple[str, FileRef]] = []
        for name, folders in places:
            with suppress(CheckpointError):  # whoever loads it says so
                place = None if name is None else locate(name)
                if isinstance(place, str) and is_local_uri(place):
                    found += checkpoint_files(place, folders=folders).items()
        own = [(name, ref) for name, ref in found if name.endswith(".safetensors") and (with_text or not is_text(name))]
        return [Path(ref.uri) for _, ref in sorted(own, key=lambda file: is_text(file[0]))]

    def at(self, checkpoint: Path, *, text_encoder: Path | None, upsampler: Path | None) -> Sources:
        """The same, by the places on this machine to which everything was brought."""
        text, upscaler = (None if place is None else str(place.absolute()) for place in (text_encoder, upsampler))
        return Sources(str(checkpoint.absolute()), text, upscaler, self.own_config)

    def pinned(self) -> Sources:
        """The same, with hub names as `name@commit`. Raises CheckpointError."""
        with _advised():
            text = None if self.text_encoder is None else pin(self.text_encoder)
        upscaler = None if self.upsampler is None else pin(self.upsampler)
        return Sources(pin(self.checkpoint), text, upscaler, self.own_config)

    def local_checkpoint(self, options: Options = None) -> Path:
        """Its folder or file on this machine. Raises CheckpointError."""
        return local_checkpoint(self.checkpoint, options, folders=self._own)

    @property
    def _own(self) -> tuple[str, ...]:
        """The checkpoint's folders of parts that do not come from elsewhere."""
        elsewhere = [*(TEXT_FOLDERS if self.text_encoder else ()), *(UPSAMPLER_FOLDERS if self.upsampler else ())]
        return tuple(folder for folder in COMPONENTS if folder not in elsewhere)

    def local_text_encoder(self, options: Options = None) -> Path:
        """The folder with text_encoder/ and tokenizer/ on this machine. Raises CheckpointError, with what to set."""
        if self.text_encoder is None:
            return self.local_checkpoint(options)
        with _advised():
            return local_checkpoint(self.text_encoder, options, folders=TEXT_FOLDERS)

    def local_upsampler(self, options: Options = None) -> Path | None:
        """The upscaler's file, or the folder with latent_upsampler/. Raises CheckpointError."""
        if self.upsampler is None:
            return None
        return local_checkpoint(self.upsampler, options, folders=UPSAMPLER_FOLDERS)


_TEXT_ADVICE = (
    "A single file holds no text encoder: set model.text_encoder to a folder, URI or hub id with text_encoder/ and "
    f"tokenizer/, or run `ltx-batch fetch {TEXT_ENCODER}` while the hub can be reached"
)


@contextmanager
def _advised() -> Iterator[None]:
    """Where a text encoder cannot be had, the error says what to set."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_TEXT_ADVICE}") from None


def find_sources(
    checkpoint: str,
    *,
    pipeline_config: str | None = None,
    text_encoder: str | None = None,
    upsampler: str | None = None,
    options: Options = None,
) -> tuple[Sources, PipelineConfig]:
    """Where everything comes from, and the pipeline config that holds: the named one, else the checkpoint's own, else the
    official base defaults.

    What is not named comes from the checkpoint where it has it, else from where the config says: `checkpoint_path` (for
    an empty `checkpoint`), `spatial_upscaler_model_path`, and the text encoder, whose official default stands in for
    none. Raises CheckpointError and JobError.
    """
    if not checkpoint and pipeline_config is not None:
        checkpoint = load_pipeline_config(pipeline_config, options=options).checkpoint_path or ""
    if not checkpoint:
        raise CheckpointError(
            "no checkpoint is named; set model.checkpoint (`render`: --checkpoint) to demo, a folder, a file, a URI, a hub id or an official name"
        )
    files = checkpoint_files(checkpoint, options)
    own_config = pipeline_config is None
    if own_config and FILE_NAME in files:
        pipeline_config = files[FILE_NAME].uri
    config = load_pipeline_config(pipeline_config, options=options)
    owned = {name.partition("/")[0] for name in files}
    if text_encoder is None and not owned.issuperset(TEXT_FOLDERS):
        text_encoder = config.text_encoder_model_name_or_path or TEXT_ENCODER
    if upsampler is None and config.pipeline_type == "multi-scale" and not owned.issuperset(UPSAMPLER_FOLDERS):
        upsampler = config.spatial_upscaler_model_path
    return Sources(checkpoint, text_encoder, upsampler, own_config), config


def _hashes(files: Mapping[str, FileRef], options: Options) -> dict[str, str]:
    return {name: file_hash(ref, options) for name, ref in sorted(files.items())}

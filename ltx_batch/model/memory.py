"""How many bytes a render takes on a device, stage by stage, from sizes alone. No torch.

Bytes a token and a pixel are counted from the tensors that live at once at a stage's peak; factors were then set by what
an H100 allocated (docs/placement.md has the points, and a test holds these functions to them).
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model.plan import PassPlan, Plan

GIB = 2**30
# Of a CUDA process beside what torch reserves: driver, libraries, kernels. Two renders that filled their limits on an H100
# had 0.77 and 0.79 GiB.
CONTEXT_BYTES = 896 * 2**20
TEXT_BYTES = GIB  # T5-XXL needs a tenth of that for 256 tokens; the rest is what an allocator cannot use
CHUNK_TOKENS = 4096
USABLE = 0.93  # of what is free: gaps between an allocator's blocks, and the error of these predictions
PREDICTED = 0.97  # of what is free: that error alone, where gaps are counted otherwise

# Of a transformer, bytes a token and channel. The rotary tables are fp32 and shared by all rows of a call.
_ROTARY = 8.0
_ROW = {"fp32": 49.0, "bf16": 25.5, "int8-weight": 25.5, "fp8": 25.5, "bnb-int8": 41.0}
# Given tokens have noise levels of their own, and so each token its six modulations, twice at the peak.
_LEVELS = 13.0  # times the bytes of a number
# In chunks of tokens: the peak is then in a norm, or where a chunk is worked on beside what waits. Counted only.
_ROW_IN_CHUNKS = {2: 16.7, 4: 28.6}
_WAITING = 4.2  # times the bytes of a number
# Of fused blocks (int8): half tables in 16 bits, and never more than the middle of the feed-forward, its rounded rows, and
# hidden states twice; in chunks, query, key and value before and after their rotation. LoRA branches want the 16-bit rows of
# a layer beside the int8 ones; in chunks that is less than the rest. Counted by a test; with the blocks before, whose count
# was 31, an H100 allocated 31.4.
_FUSED_ROTARY, _FUSED_ROW, _FUSED_ROW_IN_CHUNKS = 2.0, 17.4, 15.4
_FUSED_ROW_WITH_LORAS = 18.9
# Of a VAE, bytes a pixel for each byte of a number. The encoder's were counted only.
_DECODE, _ENCODE = 51.5, 61.0
# Of a sliced decode. Each layer of the last three stages keeps the columns that its next slice needs: 22 in a stage, of 32,
# 16 and 8 numbers for each frame and pixel of the shorter side. A stage that is small enough to be worked on whole has half
# a number a pixel. The factor of work is for what layers before the one at work hold; cuDNN's own buffers fit into it, since
# most of a layer's time less is in use than at its peak. Counted only.
_COLUMN, _KEPT_COLUMNS = 32.0, 22 * 1.75
_STAGE = 1.5 * 0.5
_WORK = 1.4
_VIDEO = 3  # channels of a decoded pixel
_UPSAMPLE = 2100.0  # bytes a token of what comes out, for each byte of a number. Counted only


@dataclass(frozen=True, slots=True)
class SliceWork:
    """Bytes that a layer of the VAE's decoder uses at once, over the bytes of what goes in: counted from live tensors, in
    the layers of diffusers. `growth` is how many numbers come out for one that goes in."""

    resnet: float
    norm: float

    def convolution(self, growth: float) -> float:
        """What goes in, the same padded in time, and what comes out."""
        return 2.25 + growth

    def upsampler(self, growth: float, *, residual: bool) -> float:
        """What comes out of its convolution, that in the order of pixels, and what is added to it."""
        return 1 + growth * (3 if residual else 2)

    def end(self, growth: float) -> float:
        """Its norm, or in a narrow decoder what comes out of its convolution, and that in the order of pixels."""
        return max(self.norm, 2.25 + 2 * growth)


# A norm of bf16 numbers goes through fp32: three times two bytes, and twice four.
SLICE_WORK = {2: SliceWork(6.05, 5.05), 4: SliceWork(4.05, 4.05)}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model as it is held. Bytes of weights by part, `blocks` of each of the transformer's blocks,
    `rest_bytes` of what it has beside them; `channels` are the transformer's, `number_bytes` 2 for bf16.
    `noisy_decoder`: the VAE's decoder draws noise in its layers, as release 0.9.1's does."""

    blocks: tuple[int, ...]
    rest_bytes: int
    encoder_bytes: int
    decoder_bytes: int
    upsampler_bytes: int
    channels: int
    number_bytes: int
    precision: str = "bf16"
    noisy_decoder: bool = False

    @property
    def transformer_bytes(self) -> int:
        return sum(self.blocks) + self.rest_bytes

    @property
    def weights_bytes(self) -> int:
        """All but the text encoder."""
        return self.transformer_bytes + self.encoder_bytes + self.decoder_bytes + self.upsampler_bytes


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of the pipeline is asked for: `rows` clips of one plan. `encoded_frames` is the length of the longest
    conditioning or input media, 0 where there is none. `loras`: with LoRA files."""

    plan: Plan
    rows: int = 1
    encoded_frames: int = 0
    conditioned: bool = False
    loras: bool = False


def denoise_bytes(sizes: ModelSizes, one: PassPlan, work: Work, *, chunked: bool = False) -> int:
    """Activations of a pass's largest call."""
    rows = max(guidance.rows for guidance in one.guidance) * work.rows
    whole = one.tokens * sizes.channels
    levels = whole * rows * _LEVELS * sizes.number_bytes if work.conditioned else 0.0
    if sizes.precision == "int8" and any(guidance.perturbed for guidance in one.guidance):
        return int(whole * (_ROTARY + rows * _ROW["bf16"]) + levels)  # disturbed attention is diffusers' own
    if sizes.precision == "int8":
        each = _FUSED_ROW_IN_CHUNKS if chunked else _FUSED_ROW_WITH_LORAS if work.loras else _FUSED_ROW
        return int(whole * (_FUSED_ROTARY + rows * each) + levels)
    if not chunked:
        return int(whole * (_ROTARY + rows * _ROW[sizes.precision]) + levels)
    chunk = min(CHUNK_TOKENS, one.tokens) * sizes.channels * rows * _ROW[sizes.precision]
    waiting = whole * rows * _WAITING * sizes.number_bytes
    return int(max(whole * rows * _ROW_IN_CHUNKS[sizes.number_bytes], waiting + chunk) + levels)


def largest_bytes(sizes: ModelSizes, one: PassPlan, work: Work, *, chunked: bool = False) -> int:
    """The largest tensor of that call: the middle of the feed-forward, or, where that comes in chunks, query, key and value."""
    rows = max(guidance.rows for guidance in one.guidance) * work.rows
    return one.tokens * sizes.channels * rows * (3 if chunked else 4) * sizes.number_bytes


def decode_bytes(sizes: ModelSizes, pixels: int) -> int:
    """Activations of the VAE's decoder for so many pixels of all frames together."""
    return int(_DECODE * sizes.number_bytes * pixels)


def columns_bytes(sizes: ModelSizes, one: PassPlan, columns: int) -> int:
    """What the largest layer of the decoder works with for so many columns of its stage, whose pixels are 4 x 4 of a frame."""
    column = _COLUMN * min(one.height, one.width) * one.num_frames * sizes.number_bytes
    return int(SLICE_WORK[sizes.number_bytes].resnet * column * columns)


def sliced_decode_bytes(sizes: ModelSizes, one: PassPlan, work_bytes: int) -> int:
    """Activations of a decode whose layers work with so many bytes at once, without the video."""
    return int(_WORK * work_bytes) + _kept_bytes(sizes, one)


def slice_work_bytes(sizes: ModelSizes, one: PassPlan, room_bytes: int) -> int:
    """What layers may work with so that a sliced decode takes `room_bytes`; the other way round."""
    return int((room_bytes - _kept_bytes(sizes, one)) / _WORK)


def _kept_bytes(sizes: ModelSizes, one: PassPlan) -> int:
    columns = _KEPT_COLUMNS * _COLUMN * min(one.height, one.width)
    return int((columns + _STAGE * one.height * one.width) * one.num_frames * sizes.number_bytes)


def video_bytes(sizes: ModelSizes, one: PassPlan) -> int:
    """A decoded video as the VAE gives it."""
    return _VIDEO * sizes.number_bytes * one.num_frames * one.height * one.width


def encode_bytes(sizes: ModelSizes, pixels: int, frames: int) -> int:
    """Activations of the VAE's encoder for `frames` of so many pixels each; a picture it pads in time to three."""
    return int(_ENCODE * sizes.number_bytes * pixels * (max(3, frames) if frames else 0))


def upsample_bytes(sizes: ModelSizes, one: PassPlan) -> int:
    """Activations of the upsampler, whose result `one` begins from."""
    return int(_UPSAMPLE * sizes.number_bytes * one.tokens)

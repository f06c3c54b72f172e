"""Pictures through H.264 and back: a still then looks like a frame of the compressed videos that the model learnt from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ltx_batch.errors import EncodeError
from ltx_batch.media.ffmpeg import FfmpegFailed, run_ffmpeg

# LTX-Video, pipelines/crf_compressor.py. One thread is one slice: by default PyAV cuts a picture into as many slices as
# the machine has cores, so that the official result depends on the machine.
_CODEC = [
    "-fps_mode",
    "passthrough",
    "-c:v",
    "libx264",
    "-crf",
    "29",
    "-preset",
    "veryfast",
    "-threads",
    "1",
    "-f",
    "h264",
]
_CONVERT = "scale=flags=bilinear"  # PyAV's conversion between RGB and YUV; ffmpeg's own default gives other pixels
_PIXELS_AT_ONCE = 2**24  # an encoder holds some 13 bytes a pixel
_MOST_AT_ONCE = 32
_TIMEOUT_S = 600.0


def compress_frames(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each of uint8 RGB [F, H, W, 3] as an H.264 video of its own, decoded again; odd sizes lose their last line.

    Bit for bit what LTX-Video's crf_compressor gives with one thread: yuv420p, CRF 29, no colour tags. A stream of
    intra frames would not be: its rate control looks back. Raises EncodeError.
    """
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    if not height or not width:
        raise EncodeError(f"H.264 needs at least 2x2 pixels, found {frames.shape[2]}x{frames.shape[1]}")
    even = np.ascontiguousarray(frames[:, :height, :width])
    count = max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))
    return np.concatenate([_compress(even[start : start + count]) for start in range(0, len(even), count)])


def _compress(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One ffmpeg with an encoder for each frame, and one that decodes what they wrote, joined."""
    with tempfile.TemporaryDirectory(prefix="ltx_batch-") as folder:
        streams = [Path(folder, f"{index}.h264") for index in range(len(frames))]
        joined = Path(folder, "all.h264")
        try:
            run_ffmpeg(_encode(frames, streams), feed=[frames.data.cast("B")], timeout_s=_TIMEOUT_S)
            joined.write_bytes(b"".join(stream.read_bytes() for stream in streams))
            data, _ = run_ffmpeg(_decode(joined), timeout_s=_TIMEOUT_S)
        except FfmpegFailed as error:
            raise EncodeError(f"pictures could not be passed through H.264: {error}") from error
    if len(data) != frames.nbytes:
        raise EncodeError(f"of {len(frames)} pictures passed through H.264, {len(data) / frames[0].nbytes:g} came back")
    return np.frombuffer(data, np.uint8).reshape(frames.shape)


def _encode(frames: NDArray[np.uint8], streams: list[Path]) -> list[str]:
    count, height, width, _ = frames.shape
    raw = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height} -framerate 1 -threads 1 -i pipe:0".split()
    copies = "".join(f"[all{index}]" for index in range(count))
    picks = [f"[all{index}]select=eq(n\\,{index})[one{index}]" for index in range(count)]
    graph = ";".join([f"[0:v]{_CONVERT},format=yuv420p,split={count}{copies}", *picks])
    outputs = [part for index, path in enumerate(streams) for part in ("-map", f"[one{index}]", *_CODEC, str(path))]
    return [*raw, "-filter_complex_threads", "1", "-filter_complex", graph, *outputs]


def _decode(stream: Path) -> list[str]:
    read = ["-threads", "1", "-f", "h264", "-i", f"file:{stream}", "-filter_threads", "1", "-vf", _CONVERT]
    return [*read, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"]

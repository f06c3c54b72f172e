"""Write a clip: as H.264, in colours that every player shows as they were meant, or one frame as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from ltx_batch.clip import Clip
from ltx_batch.errors import EncodeError
from ltx_batch.job import VideoSpec
from ltx_batch.media.ffmpeg import FfmpegFailed, run_ffmpeg

# Without the filter ffmpeg converts with BT.601 and tags nothing, and players that assume BT.709 show other colours.
# With the flags alone the matrix is right and the primaries stay unknown.
_COLOUR_FILTER = (
    "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int,"
    "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709"
)
_COLOUR_TAGS = ["-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709", "-color_range", "tv"]
# Nothing in the file may change from run to run: no encoder string of the muxer, no times, one thread per filter.
_SAME_BYTES = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1", "-filter_threads", "1"]


def write_clip(
    clip: Clip, target: Path, video: VideoSpec, *, metadata: Mapping[str, str], timeout_s: float = 600
) -> None:
    """`write_picture` where the name of `target` ends in .png, else `write_video`."""
    if target.suffix.lower() == ".png":
        write_picture(clip, target, metadata=metadata)
    else:
        write_video(clip, target, video, metadata=metadata, timeout_s=timeout_s)


def write_picture(clip: Clip, target: Path, *, metadata: Mapping[str, str]) -> None:
    """Write a clip of one frame into the PNG file `target` on a local disk, every pixel as it is.

    The same frame and Pillow give the same bytes. The file's texts are `metadata` and nothing else. Raises EncodeError,
    and leaves no file, where the clip has more frames or the file cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    _check_frames(clip)
    if len(clip.frames) != 1:
        raise EncodeError(f"a PNG holds one frame, and the clip has {len(clip.frames)}")
    texts = PngInfo()
    for name, value in metadata.items():
        texts.add_text(name, value)
    try:
        Image.fromarray(clip.frames[0]).save(target, "PNG", pnginfo=texts)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise EncodeError(f"the picture could not be written: {error}") from error


def write_video(
    clip: Clip, target: Path, video: VideoSpec, *, metadata: Mapping[str, str], timeout_s: float = 600
) -> None:
    """Encode `clip` into the MP4 file `target` on a local disk: H.264, yuv420p, BT.709, index at the front.

    The same frames, settings and ffmpeg give the same bytes. The file's tags are `metadata` and nothing else.
    Raises EncodeError, and leaves no file, on odd sizes, when ffmpeg fails, or after `timeout_s`.
    """
    _check(clip)
    frames = np.ascontiguousarray(clip.frames)
    try:
        run_ffmpeg(
            [*_input(clip), *_output(video), *_tags(metadata), str(target)],
            feed=(memoryview(frame).cast("B") for frame in frames),
            timeout_s=timeout_s,
        )
    except FfmpegFailed as error:
        target.unlink(missing_ok=True)
        raise EncodeError(f"the video could not be encoded: {error}") from error


def frame_rate_fraction(frame_rate: float) -> Fraction:
    """23.976 -> 2997/125, 24000/1001 -> itself, 8.0 -> 8: as near as a container keeps it."""
    return Fraction(frame_rate).limit_denominator(1001)


def _check_frames(clip: Clip) -> None:
    shape, kind = clip.frames.shape, clip.frames.dtype
    if kind != np.uint8 or len(shape) != 4 or shape[0] < 1 or shape[3] != 3:
        raise EncodeError(f"frames must be uint8 [F, H, W, 3] with F >= 1, not {kind} {list(shape)}")


def _check(clip: Clip) -> None:
    _check_frames(clip)
    shape = clip.frames.shape
    if shape[1] % 2 or shape[2] % 2:
        raise EncodeError(f"height and width must be even for yuv420p, not {shape[1]} x {shape[2]}")
    if not clip.frame_rate > 0:
        raise EncodeError(f"the frame rate must be positive, not {clip.frame_rate}")


def _input(clip: Clip) -> list[str]:
    height, width = clip.frames.shape[1:3]
    rate = frame_rate_fraction(clip.frame_rate)
    raw = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height}".split()
    return [*raw, "-framerate", f"{rate.numerator}/{rate.denominator}", "-threads", "1", "-i", "pipe:0"]


def _output(video: VideoSpec) -> list[str]:
    codec = f"-c:v libx264 -preset {video.preset} -crf {video.crf} -threads {video.threads} -pix_fmt yuv420p".split()
    return ["-vf", _COLOUR_FILTER, *codec, *_COLOUR_TAGS, *_SAME_BYTES]


def _tags(metadata: Mapping[str, str]) -> list[str]:
    pairs = [part for name, value in metadata.items() for part in ("-metadata", f"{name}={value}")]
    return [*pairs, "-movflags", "+faststart+use_metadata_tags", "-f", "mp4"]

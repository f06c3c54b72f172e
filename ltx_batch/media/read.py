"""Read images and videos into RGB frames."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ltx_batch.errors import MediaError
from ltx_batch.media.ffmpeg import FfmpegFailed, gist, run_ffmpeg

if TYPE_CHECKING:
    from PIL import Image

Frames = NDArray[np.uint8]

_TIMEOUT_S = 600.0
# Containers of moving pictures only: ffmpeg would also play a text file, or fetch what a playlist names.
_CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf,mxf,ivf,h264,hevc,m4v,mpegvideo"
_CONTAINER_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder"}
_HD_LINES = 720
_IMAGE_FAULTS = (OSError, ValueError, SyntaxError, EOFError, struct.error)  # of Pillow, beside its own


def read_media(source: str | Path, *, num_frames: int | None = None) -> Frames:
    """Decode a local image or video into uint8 RGB [F, H, W, 3], at most `num_frames` frames, as many as there are.

    Images: turned as their EXIF says, alpha laid over black, 16-bit grey rounded to 8; animations give their frames.
    Videos: every stored frame once, whatever its time; turned as their container says; converted with the matrix in
    their tags, and without tags with BT.709 from 720 lines on, else BT.601, as players do. HDR is not tone-mapped.
    Raises MediaError with path and reason: missing, damaged, truncated, empty, or neither image nor video.
    """
    path = _existing(source)
    frames = _read_image(path, num_frames)
    return _read_video(path, num_frames) if frames is None else frames


def count_frames(source: str | Path, *, at_most: int) -> int:
    """How many frames a local image or video has, as far as `at_most`, told as quickly as it can be: of a picture enough is
    read to know that it is whole, of a video the packets, so that pixels that cannot be decoded show only in `read_media`.

    Raises MediaError as `read_media` does.
    """
    path = _existing(source)
    count = _count_pictures(path)
    if count is not None:
        return min(count, at_most)
    _, lines, cut, faults = _packets(path, ["-frames:v", str(at_most)])
    if cut:  # of those that were let through some do not play
        _, lines, _, faults = _packets(path)
        lines = lines[:at_most]
    if not lines:
        raise MediaError(f"{path}: no frames in it")
    if faults and len(lines) < at_most:
        raise MediaError(f"{path}: damaged or cut off after {len(lines)} frames: {gist(faults)}")
    return len(lines)


def _count_pictures(path: Path) -> int | None:
    """None where Pillow does not know the format."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            count = int(getattr(image, "n_frames", 1))
            if image.format == "PNG":
                image.verify()  # its checksums: no pixel is decoded
            else:
                image.draft(
                    "RGB", (max(1, image.width // 8), max(1, image.height // 8))
                )  # JPEG is read to its end all the same
                image.load()
        return count
    except UnidentifiedImageError:
        return None
    except (*_IMAGE_FAULTS, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: the image cannot be read: {error}") from error


def probe_video(source: str | Path) -> tuple[int, int, int, float]:
    """(num_frames, height, width, frame_rate in Hz) of a video, from its packets; nothing is decoded or rotated."""
    path = _existing(source)
    head, lines, _, _ = _packets(path)
    ticks = sum(int(line.split(",")[3]) for line in lines)
    if not lines or not ticks:
        raise MediaError(f"{path}: no frames in it")
    width, height = (int(side) for side in head["dimensions 0"].split("x"))
    return len(lines), height, width, float(len(lines) / (ticks * Fraction(head["tb 0"])))


def read_metadata(source: str | Path) -> dict[str, str]:
    """The texts of a PNG file, or the tags of a video file without those that every container has."""
    path = _existing(source)
    texts = _png_texts(path)
    if texts is not None:
        return texts
    text = _ffmpeg(path, ["-f", "ffmetadata", "pipe:1"])[0].decode()
    # `\` escapes = ; # \ and a newline; an unescaped newline ends a tag.
    pairs = re.findall(r"^((?:[^\\\n=;#]|\\.)+)=((?:[^\\\n]|\\.|\\\n)*)$", text, flags=re.MULTILINE)
    tags = {re.sub(r"\\(.)", r"\1", name): re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for name, value in pairs}
    return {name: value for name, value in tags.items() if name not in _CONTAINER_TAGS}


def _png_texts(path: Path) -> dict[str, str] | None:
    """None where the file is no PNG."""
    from PIL import Image, PngImagePlugin, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {name: str(value) for name, value in image.text.items()}
    except UnidentifiedImageError:
        return None
    except (OSError, SyntaxError) as error:
        raise MediaError(f"{path}: the image cannot be read: {error}") from error


def _existing(source: str | Path) -> Path:
    path = Path(source).absolute()
    if not path.is_file():
        raise MediaError(f"{path} does not exist, or is no file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path} is empty")
    return path


def _read_image(path: Path, num_frames: int | None) -> Frames | None:
    """None where Pillow does not know the format: it may be a video."""
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pictures = []
            for picture in ImageSequence.Iterator(image):
                pictures.append(_rgb(ImageOps.exif_transpose(picture)))
                if len(pictures) == num_frames:
                    break
        return np.stack(pictures)
    except UnidentifiedImageError:
        return None
    except (*_IMAGE_FAULTS, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: the image cannot be read: {error}") from error


def _rgb(image: Image.Image) -> Frames:
    if image.mode.startswith("I"):  # 16-bit grey, under several names: 65535 / 257 = 255
        grey = np.rint(np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it as PNG")
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
    return np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(np.uint8)


def _read_video(path: Path, num_frames: int | None) -> Frames:
    _, log = _ffmpeg(path, ["-map", "0:v:0", "-c", "copy", "-frames:v", "1", "-f", "null", "-"], log_level="info")
    # PPM: each frame carries its size, which a rotation in the container may have turned.
    output = ["-vf", _to_rgb(log), "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe"]
    limit = [] if num_frames is None else ["-frames:v", str(num_frames)]
    data, faults = _ffmpeg(path, ["-map", "0:v:0", *limit, *output, "pipe:1"])
    frames = _split_ppm(data)
    if frames is None:
        raise MediaError(f"{path}: no frames in it{f' ({gist(faults)})' if faults else ''}")
    if faults and len(frames) != num_frames:
        raise MediaError(f"{path}: damaged or cut off after {len(frames)} frames: {gist(faults)}")
    return frames


def _ffmpeg(path: Path, arguments: list[str], **options: Any) -> tuple[bytes, str]:
    limits = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _CONTAINERS, "-threads", "1"]
    try:
        return run_ffmpeg([*limits, "-i", f"file:{path}", *arguments], timeout_s=_TIMEOUT_S, **options)
    except FfmpegFailed as error:
        raise MediaError(f"{path}: neither an image nor a video that can be read: {error}") from error


def _to_rgb(log: str) -> str:
    matrix, lines = _stream_colours(log)
    untagged = "" if matrix else f":in_color_matrix={'bt709' if lines >= _HD_LINES else 'bt601'}"
    return f"scale=out_range=full:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp{untagged}"


def _stream_colours(log: str) -> tuple[str | None, int]:
    """(matrix, lines) from `Video: h264 (High), yuv420p(tv, bt709, progressive), 64x48 [...]`; matrix None where untagged.

    Differing tags are listed as matrix/primaries/transfer. ffprobe would say this in JSON, but the wheel has no ffprobe.
    """
    stream = re.search(r"Stream #0.*?: Video: (.*)", log)
    size = re.search(r", \d+x(\d+)", stream.group(1)) if stream else None
    if not stream or not size:
        return None, 0
    pixels = re.search(r"\(([^()]*)\)$", stream.group(1)[: size.start()])
    words = pixels.group(1).split(", ") if pixels else []
    named = [word.split("/")[0] for word in words if word not in ("tv", "pc", "progressive") and "first" not in word]
    known = [name for name in named if name != "unknown" and not name.endswith("bpc")]
    return (known[0] if known else None), int(size.group(1))


def _split_ppm(data: bytes) -> Frames | None:
    head = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", data)
    if not head:
        return None
    width, height = int(head.group(1)), int(head.group(2))
    each = head.end() + width * height * 3  # ffmpeg scales all frames of a stream to the first one's size
    whole = np.frombuffer(data, np.uint8)[: len(data) // each * each].reshape(-1, each)
    return whole[:, head.end() :].reshape(-1, height, width, 3).copy()


def _packets(path: Path, limit: Sequence[str] = ()) -> tuple[dict[str, str], list[str], int, str]:
    """Of a video's first stream, as ffmpeg's framecrc tells: what its head says, a line each packet that plays, how many do
    not, since an edit list begins after them, and what ffmpeg found wrong."""
    data, faults = _ffmpeg(path, ["-map", "0:v:0", "-c", "copy", *limit, "-f", "framecrc", "pipe:1"])
    lines = [line for line in data.decode().splitlines() if line.strip()]
    head = dict(line[1:].split(": ", 1) for line in lines if line.startswith("#") and ": " in line)
    packets = [line for line in lines if not line.startswith("#")]
    played = [line for line in packets if not _is_discarded(line)]
    return head, played, len(packets) - len(played), faults


def _is_discarded(line: str) -> bool:
    """AV_PKT_FLAG_DISCARD: decoded for the sake of later frames, and not shown."""
    flags = re.search(r", F=0x([0-9A-F]+)", line)
    return bool(flags and int(flags.group(1), 16) & 4)

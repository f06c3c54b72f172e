"""VMAF, by the libvmaf in ffmpeg and the model that is built into it."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from ltx_batch.errors import MediaError
from ltx_batch.media.ffmpeg import FfmpegFailed, run_ffmpeg

MIN_SIDE_PX = 64  # at its coarsest scale, 1/16, VMAF has too few pixels below: equal clips of 32 x 32 score 88
_MODEL = "vmaf_v0.6.1"
_TO_YUV = "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int,format=yuv444p"
_TIMEOUT_S = 3600.0


def has_vmaf() -> bool:
    """Whether this ffmpeg was built with libvmaf, as the one of imageio-ffmpeg is from 0.6 on."""
    try:
        listed, _ = run_ffmpeg(["-filters"], timeout_s=60)
    except FfmpegFailed:
        return False
    return b" libvmaf " in listed


def vmaf(reference: NDArray[np.uint8], distorted: NDArray[np.uint8]) -> NDArray[np.float64]:
    """VMAF of each frame of `distorted`, 0 to 100, [F]; both are uint8 RGB [F, H, W, 3], at least `MIN_SIDE_PX` a side.

    The frames go through a pipe as they are, both in one picture, so that nothing but VMAF stands between them. They are
    converted to BT.709, of which the model sees the luma. Raises MediaError.
    """
    _, height, width, _ = reference.shape
    raw = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{2 * height} -framerate 25 -threads 1 -i pipe:0".split()
    graph = (
        f"[0:v]split[above][below];[above]crop=iw:{height}:0:0,{_TO_YUV}[reference];"
        f"[below]crop=iw:{height}:0:{height},{_TO_YUV}[distorted];"
        f"[distorted][reference]libvmaf=model=version={_MODEL}:n_threads=1:log_fmt=json:log_path=/dev/stdout"
    )
    command = [*raw, "-filter_complex_threads", "1", "-filter_complex", graph, "-f", "null", "-"]
    pairs = zip(reference, distorted, strict=True)
    feed = (np.concatenate(pair).data.cast("B") for pair in pairs)
    try:
        log, _ = run_ffmpeg(command, feed=feed, timeout_s=_TIMEOUT_S)
    except FfmpegFailed as error:
        raise MediaError(f"VMAF could not be computed: {error}") from error
    return np.array([frame["metrics"]["vmaf"] for frame in json.loads(log)["frames"]])

"""Conditioning media in, videos and pictures out. The one door to ffmpeg."""

from ltx_batch.media.load import load_frames
from ltx_batch.media.read import count_frames, read_media
from ltx_batch.media.roundtrip import compress_frames
from ltx_batch.media.write import write_clip, write_picture, write_video

__all__ = [
    "compress_frames",
    "count_frames",
    "load_frames",
    "read_media",
    "write_clip",
    "write_picture",
    "write_video",
]

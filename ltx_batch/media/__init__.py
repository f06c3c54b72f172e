"""Conditioning media in, videos out. The one door to ffmpeg."""

from ltx_batch.media.read import read_media
from ltx_batch.media.write import write_video

__all__ = ["read_media", "write_video"]

"""Videos: from a file to a few frames.

Goes in: a file that FFmpeg reads. Comes out: 4 to 16 RGB pictures, for `image.fit_frame`.
Read next: `image.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vita_jax.data.image import find_file


def choose_frames(
    fps: float,
    num_frames: int,
    rate: float = 1.0,
    start_s: float | None = None,
    end_s: float | None = None,
    max_frames: int = 16,
    min_frames: int = 4,
) -> list[int]:
    """Indices of the frames to look at: `rate` a second, thinned evenly to the maximum.

    Too short a clip repeats frames to reach the minimum.

    Args:
      fps: frames a second of the video.
      num_frames: frames of the video.
      rate: frames to choose a second.
      start_s: where the part to look at starts, None for the beginning.
      end_s: where it ends, None for the end; swapped with `start_s` if it comes first, a second
        later if it is the same.
      max_frames: most indices to return.
      min_frames: fewest indices to return.

    Returns:
      Indices in [0, num_frames), ascending.

    Raises:
      ValueError: a rate that is not positive, no frames, or a part that the video does not have.

    Source: VITA-1.5 paper, section 3.1 (video); the release's loader.
    """
    if not (fps > 0 and rate > 0):
        raise ValueError(f"fps={fps}, rate={rate}: expected positive numbers of frames a second")
    first, last = 0, num_frames - 1
    if start_s is not None and end_s is not None:
        start_s, end_s = min(start_s, end_s), max(start_s, end_s)
        end_s = start_s + 1 if start_s == end_s else end_s
    if start_s is not None:
        first = max(int(start_s * fps), 0)
    if end_s is not None:
        last = min(int(end_s * fps), last)
    every = max(round(fps / rate), 1)
    frames = range(first, last + 1, every)
    if not frames:
        part = f"from {start_s or 0} s to {'the end' if end_s is None else f'{end_s} s'}"
        raise ValueError(
            f"a video of {num_frames / fps:.1f} s has no frames {part}; choose another"
        )
    wanted = min(max(len(frames), min_frames), max_frames)
    return [frames[i] for i in np.linspace(0, len(frames) - 1, wanted).astype(int)]


def read_video(path: str | Path, rate: float = 1.0) -> list[Image.Image]:
    """The frames that `choose_frames` picks at `rate` a second, as upright RGB pictures.

    Frames are decoded one after another and only the chosen ones are kept.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, damaged or not a video, has no picture stream or no frames, or
        `rate` is not positive.
    """
    import av

    path = find_file(path, "video")
    try:
        fps, num_frames = _measure(path)
        while num_frames:
            chosen = choose_frames(fps, num_frames, rate)
            pictures, num_decoded = _decode(path, set(chosen))
            if num_decoded > chosen[-1]:
                return [pictures[index] for index in chosen]
            num_frames = num_decoded  # some codecs have packets that show nothing
    except av.FFmpegError as error:
        reason = error.strerror
        raise ValueError(f"{path}: not a video, or damaged ({reason}); export it again") from error
    raise ValueError(f"{path}: the video has no frames; record or export it again")


def _measure(path):
    """Frames a second and number of frames, counted: the header need not state them."""
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: no video stream in it; record or export it again")
        stream = container.streams.video[0]
        times = [packet.pts for packet in container.demux(stream) if packet.size]
        stamps = [time for time in times if time is not None]
        span_s = (max(stamps) - min(stamps)) * stream.time_base if stamps else 0
        # The rate in a header is often a guess; a raw stream or a single picture has no other.
        fps = (len(stamps) - 1) / span_s if span_s else stream.average_rate or 1
        return float(fps), len(times)


def _decode(path, wanted):
    """Pictures of the `wanted` frames by index, and how many frames were decoded to find them."""
    import av

    pictures, num_decoded = {}, 0
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if num_decoded in wanted:
                pictures[num_decoded] = frame.to_image().rotate(frame.rotation, expand=True)
            num_decoded += 1
            if len(pictures) == len(wanted):
                break
    return pictures, num_decoded

"""Frames of a video side by side, evenly spread from the first to the last, in one picture.

    python benchmarks/frame_strip.py runs/RUN/videos/TIME/rl-video-episode-0.mp4 benchmarks/figures/microrts_demo.png

A picture that is there already is replaced.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import tyro
from moviepy import VideoFileClip
from report import fail


@dataclass
class Args:
    video: tyro.conf.Positional[Path]
    """what --capture-video has filmed"""
    picture: tyro.conf.Positional[Path]
    """the .png to write"""
    frames: int = 6
    """how many"""
    height: int = 200
    """of the picture, in pixels"""


def main(args: Args):
    if not args.video.is_file():
        fail(f"{args.video}: there is no such file; give an .mp4 of --capture-video")
    with VideoFileClip(str(args.video)).resized(height=args.height) as clip:
        chosen = np.linspace(0, clip.n_frames - 1, args.frames).round()
        strip = np.hstack([clip.get_frame((index + 0.5) / clip.fps) for index in chosen])
    matplotlib.image.imsave(args.picture, strip)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

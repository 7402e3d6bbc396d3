"""Frames of a video side by side, the first and the last among them, in one picture.

    python benchmarks/frame_strip.py runs/RUN/videos/TIME/rl-video-episode-0.mp4 benchmarks/figures/microrts_demo.png

The colours are reduced to 256, which halves the file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from moviepy import VideoFileClip
from PIL import Image


@dataclass
class Args:
    video: tyro.conf.Positional[Path]
    """what --capture-video has filmed"""
    picture: tyro.conf.Positional[Path]
    """the .png to write"""
    frames: int = 6
    """how many, evenly spread"""
    height: int = 240
    """of each, in pixels"""


def main(args: Args):
    with VideoFileClip(str(args.video)) as clip:
        last = clip.n_frames - 1
        chosen = [clip.get_frame((index + 0.5) / clip.fps) for index in np.linspace(0, last, args.frames).round()]
    images = [Image.fromarray(frame) for frame in chosen]
    sizes = [(round(image.width * args.height / image.height), args.height) for image in images]
    strip = np.hstack([np.asarray(image.resize(size)) for image, size in zip(images, sizes)])
    Image.fromarray(strip).convert("P", palette=Image.Palette.ADAPTIVE).save(args.picture, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Labelled audio-visual events, rendered to real video files.

Eight classes of motion, each with a sound that follows from what is seen: an impact sounds at the instant it happens, pitch
follows size or place, rhythm follows motion. What does *not* tell the class is drawn at random: colours, shapes, sizes, tempo,
pitch register, loudness, background texture, noise in picture and sound, an unrelated object, an unrelated faint sound. So the
class can be learnt from either modality, but not read off an average colour, a loudness or a background.

A clip is a function of (seed, class name, index) and of the options that shape it, and of nothing else: neither the number of
workers nor the subset of classes changes it.
"""

from xkd_fast.data.synthetic.clip import render_clip, write_clip
from xkd_fast.data.synthetic.dataset import clip_path, render_dataset
from xkd_fast.data.synthetic.options import CLASSES, SyntheticOptions
from xkd_fast.data.synthetic.scene import Clip

__all__ = ["CLASSES", "Clip", "SyntheticOptions", "clip_path", "render_clip", "render_dataset", "write_clip"]

"""CLIP towers through open_clip: any of its models, a folder of open_clip or Hugging Face, or the embedded default.

Models trained with the sigmoid loss (SigLIP, SigLIP 2) are served like all others: they choose one of K candidates, and
the confidence is max softmax(logit_scale · v · t), with the model's own logit_scale. This is MCM for them, too. Their
logit_bias is the same for every candidate and cancels in the softmax, so it is not kept. Their sigmoid scores one pair
of image and text; it is no probability among K candidates.
"""

from vilu.clip.load import load_clip, load_clip_for
from vilu.clip.model import Clip, Projected

__all__ = ["Clip", "Projected", "load_clip", "load_clip_for"]

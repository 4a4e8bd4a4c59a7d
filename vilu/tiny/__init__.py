"""The embedded CLIP and its two sources of images. They need no download."""

from pathlib import Path

NAME = "vilu-tiny"
FOLDER = Path(__file__).parent

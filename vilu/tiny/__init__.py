"""The two embedded CLIPs, a small and a larger one, and their two sources of images. They need no download."""

from pathlib import Path

NAME = "vilu-tiny"
LARGE = "vilu-tiny-large"
FOLDER = Path(__file__).parent
FOLDERS = {NAME: FOLDER, LARGE: FOLDER / "large"}

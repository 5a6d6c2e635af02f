"""Models that the project trained and ships, each a folder with weights, configuration, tokeniser and card."""

from pathlib import Path

MINI_CLIP = Path(__file__).parent / "mini_clip"

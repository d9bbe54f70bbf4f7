"""Where the pretraining writes: the shipped folders, and a git-ignored one for work."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE_FOLDER = ROOT / "models" / "base"
DATA_FOLDER = ROOT / "data"
WORK_FOLDER = ROOT / "runs" / "pretraining"

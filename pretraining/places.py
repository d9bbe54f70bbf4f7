"""Where the pretraining writes: the shipped folders, and a git-ignored one for work."""

from course_utils import paths

ROOT = paths.project_root()
BASE_FOLDER = paths.models_dir() / "base"
PICTURES_FOLDER = paths.pictures_dir()
DATA_FOLDER = paths.data_dir()
WORK_FOLDER = ROOT / "runs" / "pretraining"

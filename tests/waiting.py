"""What can be tested only once the base model is made. These tests wake by themselves when `models/base` is there."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

needs_base_model = pytest.mark.skipif(
    not (ROOT / "models" / "base" / "config.json").is_file(), reason="models/base is not made yet: make base-model"
)

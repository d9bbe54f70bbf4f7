"""What the tests share."""

import os
import sys
from pathlib import Path

# Before any library reads it: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent / "comparison"))

from tiny_models import tiny_folders, tiny_model, tiny_model_folder, tiny_tokenizer  # noqa: F401 (fixtures)

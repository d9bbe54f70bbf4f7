"""What the tests share."""

import os

# Before any library reads it: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from tiny_models import tiny_folders, tiny_model, tiny_model_folder, tiny_tokenizer  # noqa: F401 (fixtures)

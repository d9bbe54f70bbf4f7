"""How `models/` and `data/` were made: world, corpus, tokenizer, training, tasks, adapters, card."""

import course_utils  # noqa: F401  before torch, whose threads it tells how to wait

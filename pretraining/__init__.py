"""How `models/` and `data/` were made: world, corpus, tokenizer, training, tasks, adapters, card."""

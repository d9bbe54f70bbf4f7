"""Longer sweeps over seeds and settings, one short script each; `python -m experiments.run` runs them."""

"""Maintenance scripts: what turns lessons into notebooks and keeps the set-up in order."""

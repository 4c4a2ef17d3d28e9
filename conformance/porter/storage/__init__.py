"""Checkpoints on disk: what is in them, one tensor at a time; and how they are written whole."""

"""Reads checkpoints one tensor at a time, and writes them whole or not at all."""

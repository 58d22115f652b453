"""Checkpoints on disk: where they are, and the embedded default model. Loads no torch."""

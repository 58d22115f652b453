"""Checkpoints on disk: where they are, and the embedded default model. Importing it does not load torch."""

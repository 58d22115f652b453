"""Torch, one pass at a time: loading, the packed forward pass over the KV pool, picks, the engine thread."""

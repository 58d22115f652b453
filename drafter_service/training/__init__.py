"""Drafters trained from a target's own answers. One module per method; data and loop are shared."""

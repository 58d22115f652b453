"""The decoder of the dense families, written out, and where its weights come from."""

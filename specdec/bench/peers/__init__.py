"""Other engines in the same run: the programs that run them, and how a benchmark talks to these programs."""

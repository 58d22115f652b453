"""The command line: `specdec up`, `generate`, `chat`, `compare`, `info`, `bench`, `down`."""

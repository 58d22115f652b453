"""Benchmarks through the gateway: `specdec bench run` and `specdec bench compare`."""

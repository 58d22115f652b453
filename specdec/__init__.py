"""Speculative decoding as a gRPC microservice system: shared library and client SDK."""

"""Speculative decoding as a gRPC microservice system: shared library and client SDK."""

PROTOCOL_VERSION = 1
"""Version of the wire protocol in protos/specdec/v1; peers with another one are refused."""

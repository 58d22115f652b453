"""Connections between processes: channels, TLS, and the first exchange of every session."""

"""Versions of the wire protocol, and names in the metadata of calls."""

PROTOCOL_VERSION = 2
"""Newest version of protos/specdec/v1 that this release speaks."""
MIN_PROTOCOL_VERSION = 2
"""Oldest version that it speaks. Peers whose ranges share no version refuse each other."""
REQUEST_ID_METADATA = "x-request-id"
"""Key of a call's metadata by which a client names its request."""

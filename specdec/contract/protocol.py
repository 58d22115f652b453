"""The versions of the wire protocol, and the keys that calls carry in their metadata."""

PROTOCOL_VERSION = 2
"""The newest version of protos/specdec/v1 that this release speaks."""
MIN_PROTOCOL_VERSION = 2
"""The oldest version that this release speaks. Peers whose ranges do not overlap refuse each other."""
REQUEST_ID_METADATA = "x-request-id"
"""The metadata key under which a client sends the id of its request."""

"""The draft-verify loop and what it needs. Pure asyncio: neither gRPC nor protobuf."""

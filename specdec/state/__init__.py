"""The target's state, read from another process: mapped, or mirrored from a stream."""

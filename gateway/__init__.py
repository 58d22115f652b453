"""The gateway: tokenises, runs the draft-verify loop, streams text. Imports no torch."""

"""The parts of which every server is made: configuration, interceptors, health, sessions, telemetry."""

"""What any server is made of: configuration, interceptors, health, sessions, telemetry."""

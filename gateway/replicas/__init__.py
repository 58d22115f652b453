"""The services behind the gateway: which replicas there are, sessions on them, and their loss."""

"""One request from its message to its last one: what it asks for, its text, its statistics."""

"""EAGLE-3 drafters: one decoder layer over tokens and the target's features, token by token."""

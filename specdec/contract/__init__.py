"""The words that every process shares: errors, sampling parameters, methods, draft trees, target state."""

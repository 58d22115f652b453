"""N-grams of the text and of what the target usually says."""

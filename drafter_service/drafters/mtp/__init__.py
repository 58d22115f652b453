"""MTP drafters: Gemma 4 assistants over the target's own KV cache."""

"""The drafter service: guesses the next tokens, from whatever drafters it has loaded."""

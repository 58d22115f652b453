"""The target-verifier service: runs the target model, checks drafts, always has the last word."""

"""The verifier service: it runs the target model, checks drafts and always has the last word."""

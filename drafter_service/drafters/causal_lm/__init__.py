"""An independent draft model."""

"""DFlash drafters: block diffusion, a whole block of drafts in one pass."""

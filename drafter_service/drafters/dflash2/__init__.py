"""DFlash 2 drafters: convolutions along the block, and a selector between neighbouring guesses."""

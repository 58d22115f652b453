"""DSpark drafters: DFlash with a bias by the token before, and a head that says how sure it is."""

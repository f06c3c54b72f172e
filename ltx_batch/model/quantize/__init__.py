"""How weights are held: `policy` decides (no torch), the other files do it."""

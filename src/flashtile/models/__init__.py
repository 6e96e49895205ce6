"""Models built on flashtile's functions, one file each."""

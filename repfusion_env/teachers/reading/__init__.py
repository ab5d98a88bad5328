"""How a frozen network is read: built, traced, noised, and its outputs made maps."""

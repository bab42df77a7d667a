"""Numbers only: rounding, sums, divergences; nothing here knows about files or models."""

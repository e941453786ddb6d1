"""Smaller models at lower cost: weights in 8 and 4 bits."""

"""The parts of compare.py: who takes part, how they take turns, and what comes of it."""

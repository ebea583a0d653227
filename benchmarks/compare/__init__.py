"""The parts of compare.py: the systems that are compared, how they are measured, and what the measurements say."""

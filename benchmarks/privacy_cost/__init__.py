"""The parts of privacy_cost.py: the systems that take its steps."""

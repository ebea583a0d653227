"""The rank of first_step.py."""

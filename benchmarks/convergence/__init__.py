"""The parts of convergence.py: its runs of `hvdlm train`, and their loss curves."""

"""The parts of recovery.py: a job one of whose ranks is killed."""

"""The parts of scaling.py, report.py and allreduce.py."""

"""The parts of scaling.py, report.py, allreduce.py and timeline.py."""

"""The parts of parameter_server.py: workers whose speeds are made."""

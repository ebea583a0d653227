"""The parts of server_link.py: what links alone allow, and how the measurements are shown."""

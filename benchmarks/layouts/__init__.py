"""The parts of layouts.py: forecasts beside measurements."""

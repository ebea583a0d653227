"""What all benchmarks use: how they run as commands, on what, and how results are kept."""

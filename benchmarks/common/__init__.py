"""What all benchmarks share: command-line scripts, launchers, emulated hosts, result files and plots."""

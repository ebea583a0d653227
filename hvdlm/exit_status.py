"""Exit statuses with a meaning of their own; 0 and 1 mean success and failure as usual."""

STOPPED_EARLY = 75
"""Training saved a checkpoint and stopped before its last step: EX_TEMPFAIL of sysexits.h, "try again later"."""

INTERRUPTED = 130
"""Ctrl-C where nothing is saved, or for the second time: 128 + SIGINT, as shells have it."""

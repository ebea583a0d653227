"""The one exception that is meant for the user rather than for a developer."""


class HvdlmError(Exception):
    """What went wrong, where, and what to do about it, in one sentence.

    The command line prints the sentence and exits non-zero on every rank; any
    other exception that escapes is a bug and keeps its traceback.
    """


class JobError(HvdlmError):
    """An error that every rank of a job raises at the same place, so that one rank can speak for all."""

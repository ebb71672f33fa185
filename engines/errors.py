"""The exceptions that a user's mistake raises."""


class VocabtrimError(Exception):
    """A mistake that the caller can correct. The message is one line that says what is wrong and what to do.

    The command line prints it and exits with code 2; it never shows a traceback for it.
    """


class ContextExceededError(VocabtrimError):
    """The prompt leaves no room in the target's context."""

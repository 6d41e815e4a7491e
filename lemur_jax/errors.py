"""The base of every error whose message is meant for the person at the keyboard."""


class LemurError(Exception):
    """Says what is wrong (field, tensor or file), with which value, and how to mend it.

    The command line prints the message without a traceback; anything else is a bug.
    """


class UsageError(LemurError):
    """A flag that does not exist or a value that a flag does not take."""

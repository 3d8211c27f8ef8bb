"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """What was given cannot be used. The message says what was found, what was expected and what
    to do; the command line prints it without a traceback."""

"""The exception for problems that the user can solve."""


class InputError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected and what to do;
    the command line prints it without a traceback."""

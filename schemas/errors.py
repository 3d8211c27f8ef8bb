"""The exception for problems that the user can solve."""


class InputError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected and what to do;
    the command line prints it without a traceback.

    It may hold texts of a stranger's store, and URLs: see :func:`semroute.schemas.escaping.shown`.
    """

    def __init__(self, message: object = "") -> None:
        from .escaping import shown

        super().__init__(shown(message))

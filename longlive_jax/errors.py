"""The errors that are the user's to act on: commands print them without a traceback."""


class InputError(ValueError):
    """Bad input. The message names the value, the limit and the way out.

    Commands exit with code 2.
    """


class NotFiniteError(ArithmeticError):
    """Results that are NaN or infinite. The message names the place and the likely cause.

    Commands exit with code 1; what was written before it stays.
    """


class StorageError(OSError):
    """Object storage that refuses a request, or does not answer: errno, reason, address.

    Commands exit with code 1, and with code 2 before they have begun.
    """

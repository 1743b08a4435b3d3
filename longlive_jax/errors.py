"""The one error that means "the input is wrong", for everything a user can get wrong."""


class InputError(ValueError):
    """Bad input. The message names the value, the limit and the way out.

    Commands print it without a traceback and exit with code 2.
    """

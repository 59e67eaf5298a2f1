"""The one exception that speaks to the user."""


class UserError(ValueError):
    """A mistake in a config, a flag or a data file, told as: what came, what is allowed, what to do.

    The command line prints its text and ends with exit code 2, without a traceback.
    """

"""The one exception that speaks to the user."""


class UserError(ValueError):
    """A mistake in a config, a flag or a data file, told as: what came, what is allowed, what to do.

    The command line prints its text and ends with exit code 2, without a traceback.
    """


def cause_of(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The first of the given kinds that an error is, or was raised from, however deeply libraries have wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Refuse the value of a field.

    Raises:
        UserError: ``holds`` is false.
    """
    if not holds:
        raise UserError(f"{field} must be {allowed}, got {value}.")

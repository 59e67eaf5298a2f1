"""Lazy defaults: parts that a signature names and does not build, so that ``--print_config`` shows them."""

from typing import TypeVar

PartT = TypeVar("PartT")


def built(part: PartT) -> PartT:
    """Return a given part as it is, and build a lazy default anew.

    The command line builds its parts itself. In Python, ``jsonargparse``'s lazy default has no attributes before its
    first method call, and all objects with the same signature would share it, state included.
    """
    if not hasattr(part, "lazy_get_init_args"):
        return part
    new: PartT = part._lazy_class_type(**part.lazy_get_init_args())  # type: ignore[attr-defined]
    return new

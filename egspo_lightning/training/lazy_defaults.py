"""Lazy defaults: default arguments that are built on use, so that ``--print_config`` can show their settings."""

from typing import TypeVar

PartT = TypeVar("PartT")


def instantiate_lazy_default(part: PartT) -> PartT:
    """Build a new object from a lazy default; return any other object unchanged.

    The command line builds its parts itself. In Python, ``jsonargparse``'s lazy default has no attributes before its
    first method call, and all objects with the same signature would share it, state included.
    """
    if not hasattr(part, "lazy_get_init_args"):
        return part
    new: PartT = part._lazy_class_type(**part.lazy_get_init_args())  # type: ignore[attr-defined]
    return new

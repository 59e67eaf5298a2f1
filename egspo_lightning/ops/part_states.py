"""States of the parts of a method, such as a gate's running mean, by name and class."""

from collections.abc import Mapping
from typing import Any

States = dict[str, Any]


def states_of(parts: Mapping[str, Any]) -> States:
    """The states of those parts that keep one, with their class names."""
    stateful = {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}
    return {name: {"class": type(part).__name__, "state": part.state_dict()} for name, part in stateful.items()}


def restore(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Restore ``states_of`` the parts; a part of another class than the saved one starts fresh."""
    for name, part in parts.items():
        if hasattr(part, "load_state_dict") and states.get(name, {}).get("class") == type(part).__name__:
            part.load_state_dict(states[name]["state"])

"""Base class of callbacks that keep some of their attributes in checkpoints."""

from typing import Any, ClassVar

from lightning.pytorch import Callback


class CheckpointedCallback(Callback):
    """Callback that writes the attributes named in ``checkpointed`` into checkpoints, and continues from them."""

    checkpointed: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Attributes that a resumed run needs."""
        return {name: getattr(self, name) for name in self.checkpointed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        vars(self).update(state_dict)

"""Entry point: ``python -m egspo_lightning COMMAND``, or ``egspo COMMAND`` for short. ``--help`` lists the commands."""

import os
import sys


def main() -> None:
    """Entry point of ``egspo`` and ``python -m egspo_lightning``."""
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does, for modules of the user
    from egspo_lightning.cli.early_answers import answer_or_exit

    answer_or_exit(sys.argv[1:])
    from egspo_lightning.cli.main import main as run  # imports torch, which takes seconds
    from egspo_lightning.cli.process_exit import leave
    from egspo_lightning.errors import RunStopped

    try:
        run()
    except RunStopped as stopped:  # by a signal, on every rank
        leave(int(stopped.code or 0))
        raise
    leave(0)


if __name__ == "__main__":
    main()

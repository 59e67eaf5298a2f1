"""Entry point: ``python -m egspo_lightning {fit,validate,test,predict,plan,replay}``, or ``egspo`` for short."""


def main() -> None:
    """Entry point of ``egspo`` and ``python -m egspo_lightning``."""
    from egspo_lightning.cli.main import main as run  # imports torch, which importing this file must not
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

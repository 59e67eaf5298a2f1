"""The parser of the command line, built once."""

import pytest

from egspo_lightning.cli.main import EgspoCLI


class BuiltError(Exception):
    """Raised in place of parsing, after the parser has been built."""


@pytest.fixture(scope="package")
def parser():
    """The parser of the command line."""
    built = []

    def stop(self, parser, args):
        built.append(parser)
        raise BuiltError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EgspoCLI, "parse_arguments", stop)
        with pytest.raises(BuiltError):
            EgspoCLI([])
    return built[0]

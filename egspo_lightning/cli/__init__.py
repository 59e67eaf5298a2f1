"""The command line: LightningCLI, parser, subcommands, exit codes, environment checks."""

"""Generated tasks: problems with worked solutions, without files or network."""

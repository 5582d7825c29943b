"""The command `findrec`: one function for each subcommand."""

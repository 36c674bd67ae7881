"""The command line; every command is one file."""

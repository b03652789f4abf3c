"""The command line, and the scripts that set a machine up."""

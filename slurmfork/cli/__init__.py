"""The command line: one module per group of verbs; parses, calls ``slurmfork.run``, prints."""

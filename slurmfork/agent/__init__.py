"""The agent: one process a node that starts, watches and stops the workers there, under its guardian."""

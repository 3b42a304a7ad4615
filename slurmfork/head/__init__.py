"""The head: one process a run that waits for the agents, plans, fans requests out, and decides how the run ends."""

"""Other machines: how commands reach a login node or a compute node, and how a verb is run over there."""

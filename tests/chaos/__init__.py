"""Fault injection: random runs on a real backend, a fault at a random moment, and a check of what is left.

``scripts/chaos`` is its command line. Nothing here uses slurmfork's own ways of finding or ending processes.
"""

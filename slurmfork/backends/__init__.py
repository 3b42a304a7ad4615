"""Backends: who gives the nodes. Each gets nodes and has one agent started on each; the rest is common code."""

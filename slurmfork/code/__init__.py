"""Code: a user's working directory, listed and read where it is, kept by content where it goes, laid into runs.

The head and the agents import none of this: what they need is in the run directory already.
"""

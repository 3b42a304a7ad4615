"""Doctor: what slurmfork needs of this machine, its file system and its cluster, what of it is not so, and what to do.

Each check is a small function that looks at one thing. Nothing is changed but for one small file that is written under
the root and removed again, and this user's directory under /tmp, which is made.
"""

"""The rooms of scripts/minicluster. Nothing here needs more than Python 3.10's standard library.

Imports point one way: main -> up -> (keeper, down, report) -> daemons -> (slurm_conf, ssh_files) -> (ssh_keys, users,
privsep) -> clients -> processes -> accounts -> words; packages and store need words alone.
"""

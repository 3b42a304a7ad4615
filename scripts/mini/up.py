"""Brings a cluster up; what does not come up whole is taken down."""

from __future__ import annotations

import sys
from pathlib import Path

from mini.down import take_down
from mini.inside import need_namespaces
from mini.keeper import start
from mini.packages import need_packages
from mini.processes import is_up
from mini.releases import RELEASES
from mini.report import headline
from mini.roots import root_of
from mini.sites import foreign_commands, need_site
from mini.store import claim, load, lock_of, locked
from mini.users import need_a_way_in
from mini.words import Cluster, Failed, Record, Shape


def up(cluster: Cluster, shape: Shape, may_install: bool) -> None:
    need_site(cluster, shape)
    need_packages(shape, may_install)
    need_namespaces(shape)
    if release := RELEASES.get(shape.slurm) or foreign_commands(shape):
        root_of(release)
    with locked(lock_of(cluster)):
        record = load(cluster)
        if record and is_up(record):
            if record.shape != shape:
                raise Failed(
                    f"{cluster.name} is up in another shape; first: {Path(sys.argv[0]).name} down --name {cluster.name}"
                )
            print(f"already up: {headline(cluster, record)}")
            return
        if shape.ssh:
            need_a_way_in(cluster)
        take_down(cluster)  # what a crash has left
        record = Record(shape, claim(cluster, shape).block)
        try:
            start(cluster, record)
        except BaseException:
            take_down(cluster)
            raise
        print(headline(cluster, load(cluster) or record))

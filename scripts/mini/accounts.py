"""Which of the machine's Unix users are a cluster's: those that carry its directory in their comment."""

from __future__ import annotations

from pathlib import Path

from mini.words import Cluster

PASSWD = Path("/etc/passwd")  # read here and not by NSS: useradd writes nowhere else
MARK = "slurmfork minicluster "  # followed by the cluster's directory, in the comment of each of its users


def marked() -> dict[str, tuple[int, str]]:
    """Users that any minicluster has made: name -> (uid, directory of the cluster)."""
    lines = (line.split(":") for line in PASSWD.read_text().splitlines() if line.count(":") == 6)
    return {words[0]: (int(words[2]), words[4][len(MARK) :]) for words in lines if words[4].startswith(MARK)}


def made_for(cluster: Cluster) -> dict[str, int]:
    """The cluster's users: name -> uid."""
    return {name: uid for name, (uid, home) in marked().items() if home == str(cluster.home)}

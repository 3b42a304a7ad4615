"""The provision of a run with its code: from a directory of this machine, or from what was sent from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slurmfork.code import laying, manifest
from slurmfork.code.laying import Fill
from slurmfork.code.listing import listing
from slurmfork.code.manifest import Entry
from slurmfork.code.store import Store
from slurmfork.errors import UsageError
from slurmfork.rundir import CodeRecord
from slurmfork.spec import Code


class Provision:
    """Code that is known to be fit for a run. ``record`` is what the run keeps of it, ``notes`` what is to be said."""

    def __init__(self, entries: Sequence[Entry], record: CodeRecord, fill: Fill, notes: Sequence[str] = ()) -> None:
        self.record = record
        self.notes = list(notes)
        self._entries, self._fill = entries, fill

    @classmethod
    def here(cls, code: Code, root: Path) -> Provision:
        """From the directory that a spec names; runs live under ``root``. Raises UsageError."""
        found = listing(code, avoid=[root])
        return cls(found.entries, found.record, laying.from_directory(found.directory), found.notes)

    @classmethod
    def sent(cls, name: str, root: Path) -> Provision:
        """From the store beside the runs, where ``name``, in hex, is the manifest's. Raises UsageError, RunDirError."""
        store = Store(root)
        try:
            digest = bytes.fromhex(name)
        except ValueError:
            digest = b""
        if len(digest) != manifest.DIGEST_SIZE:
            raise UsageError(f"{name[:80]!r} names no code that was sent")
        found = manifest.decode(store.copy(digest))
        return cls(found.entries, found.record, laying.from_store(store))

    def lay(self, place: Path) -> None:
        """Lay it into a run directory; what vanished meanwhile is noted. Raises RunDirError."""
        if vanished := laying.lay(self._entries, place, self._fill):
            self.notes.append(f"these files of the code vanished while it was copied: {', '.join(vanished[:10])}")

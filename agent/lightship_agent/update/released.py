"""Update: one file of the verified release list, as those know it who never load the TUF client."""

from __future__ import annotations

import msgspec


class ReleasedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A target of the verified release list. `prefixed` is whether the repository keeps it under its digest."""

    path: str
    sha256: str
    length: int  # bytes
    prefixed: bool = True

    @property
    def url_path(self) -> str:
        """Where the repository keeps it; with consistent snapshots, under a name that holds its digest."""
        if not self.prefixed:
            return self.path
        folder, slash, name = self.path.rpartition("/")
        return f"{folder}{slash}{self.sha256}.{name}"

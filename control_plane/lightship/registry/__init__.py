"""Registered models, versions, aliases, gates and lineage."""

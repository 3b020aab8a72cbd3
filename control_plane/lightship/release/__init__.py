"""Releases: bundle build, the TUF repository, keys."""

"""Watching in the control plane: ingest, and the pure decisions about drift and performance."""

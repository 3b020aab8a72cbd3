"""Datasets: content-addressed versions, schema, validation, profile."""

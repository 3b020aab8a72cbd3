"""Grafana's dashboards, written from a few lines each: `python -m dashboards`."""

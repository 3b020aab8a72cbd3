"""The dashboard: server-rendered pages and plots."""

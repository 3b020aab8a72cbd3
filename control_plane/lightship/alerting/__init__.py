"""Alerting: what people are told of, where they read it, and until when they want to hear nothing."""

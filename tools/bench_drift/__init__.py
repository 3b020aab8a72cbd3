"""Bench drift: how often the drift alarms are false, and how soon they are true."""

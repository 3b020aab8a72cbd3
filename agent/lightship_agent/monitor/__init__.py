"""Watching on the device: ring buffer, window counts, labels joined by prediction id, device health."""

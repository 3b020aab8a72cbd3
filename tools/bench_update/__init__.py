"""Bench update: what looking for news, getting it, and having got it costs a device. `make bench-update`."""

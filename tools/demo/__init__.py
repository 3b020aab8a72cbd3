"""The one-command demo: the whole loop, for real, on a fleet of five camera meters.

Nothing is simulated but the physical world: which image a camera sees, its lens, and the light (`world`).
"""

"""Faces over one transport-free data plane."""

"""HTTP faces: one for devices (mutual TLS), one for operators (loopback)."""

"""The version, where packaging and the wire both read it."""

__version__ = "0.1.0"

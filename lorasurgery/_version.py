"""The version, where nothing else is: whatever needs it imports no more than this."""

__version__ = "0.1.0"

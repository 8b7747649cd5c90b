"""Flags as frozen dataclasses, shared by the commands."""

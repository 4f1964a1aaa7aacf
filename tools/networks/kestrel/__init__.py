"""Kestrel: our own small matcher across modalities."""

"""ALIKED, image pair to matches in one graph."""

"""Generators of files that are checked in."""

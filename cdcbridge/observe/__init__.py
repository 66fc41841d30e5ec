"""Measurements and messages for people and monitoring. This package never changes a database."""

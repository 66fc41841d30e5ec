"""Alerts: evaluate the rules, queue notifications in the store, and deliver them to people."""

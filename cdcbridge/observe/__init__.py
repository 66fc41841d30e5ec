"""Figures and words for people and monitors. Nothing here changes anything."""

"""Reasons why the bridge would not work, each with its fix. Nothing here changes anything."""

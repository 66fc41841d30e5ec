"""Undo changes in the source: `cdcbridge revert`.

`messages`, `history`, `plan` and `order` are pure. `selection` reads the log, `tables` reads and writes the source, and
`undo` joins them. Never changes a row that it has not locked and compared.
"""

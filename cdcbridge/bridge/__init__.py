"""The running process: what it prepares, its streaming session, and the operations on its slot."""

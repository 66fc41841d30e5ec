"""The running bridge: its preparation, its streaming session, and the operations on its slot."""

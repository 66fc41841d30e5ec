"""Changes as the decoders read them from the WAL, and their identity. Pure: nothing here touches a database."""

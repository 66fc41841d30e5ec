"""Read the source, the database whose changes the bridge captures. No module here imports the store."""

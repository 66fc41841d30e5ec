"""The dashboard: pages for people, made on the server. Never counts rows of the log or of a queue."""

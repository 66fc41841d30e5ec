"""The SQS endpoint of `cdcbridge serve`: queue and fifo consumers, for clients of Amazon SQS.

A request is checked (signature.py), read (requests.py), answered (managing.py, sending.py, receiving.py), and written
in its own protocol (answers.py). Never keeps a message, and never creates a queue.
"""

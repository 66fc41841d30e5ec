"""The SQS endpoint of `cdcbridge serve`: queue and fifo consumers, for clients of Amazon SQS.

A request is checked (signature.py), read (requests.py), answered by an action (actions.py), and written in the protocol
of the request (answers.py). Never keeps a message, and never creates a queue.
"""

"""What travels between processes, without any input or output: messages, reports, the interface file.

Nothing in this package opens a socket or knows an event loop.
"""

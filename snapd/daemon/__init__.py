"""The daemon: everything that decides, on trio.

The command line and the clients never import this package, except for the command that starts the daemon.
"""

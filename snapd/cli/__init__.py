"""The command line: one file a command, imported when the command is called.

Nothing here decides anything about targets: commands ask the daemon and show what it answers.
"""

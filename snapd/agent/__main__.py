"""Prints the path of libsnapd-agent.so: `python -m snapd.agent`."""

from snapd.agent import library_path

if __name__ == "__main__":
    print(library_path())

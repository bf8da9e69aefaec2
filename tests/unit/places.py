"""Where a small file is damaged, one place after the other, so that a short test still meets every field."""

from snapd.store.format import HEADER_BYTES


def places(content: bytes, noise: bytes, step: int) -> list[int]:
    """Return each place of a file, but of its header's padding and of a page of noise in it only every `step`-th."""
    padding = range(len(content[:HEADER_BYTES].rstrip(b"\0")) + 8, HEADER_BYTES - 8)
    start = content.index(noise)
    body = range(start + 8, start + len(noise) - 8)
    return [at for at in range(len(content)) if at % step == 0 or not (at in padding or at in body)]

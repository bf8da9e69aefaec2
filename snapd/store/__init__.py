"""The store: a session's file of frames, one compressed page each.

`format` is the only parser of its bytes, `writer` makes stores, `reader` gives pages back or says why not, and
`verify` tries every frame. The format is written down in docs/format.md. No trio and no C here.
"""

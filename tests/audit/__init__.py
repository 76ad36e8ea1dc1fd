"""What the kernels are before any GPU has seen them: every variant as machine code, and the bytes that every op moves.

`make audit` prints both tables; tests/test_audit.py runs a smaller grid. Both call the backend's public functions alone, so
that new kernels and new rungs of a ladder are covered as they come.
"""

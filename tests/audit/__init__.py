"""What the kernels are before any GPU has seen them: every variant as machine code, and the bytes that every op moves.

`make audit` prints the tables; tests/test_audit.py runs a smaller grid. Triton's come from the public functions of its backend,
so that new kernels and new rungs of a ladder are covered as they come; cuda.py reads the compiled library of csrc/cuda.
"""

"""Random calls of every public function, beside the truth that is written out here.

calls.py says what a call is, draws.py draws them, truth.py has the results and how far off each may be, peers.py torch's own,
verdict.py holds one to the other; wrecks.py has invalid calls, found.py what has been found.
"""

"""Seeded fuzzers: damaged data files, run folders and stores, and what the programs make of them.

    python -m tests.fuzz npz --cases 3000 --seed 0 --out npz.json

Of every case one word is kept: *same* (accepted, the values of the undamaged file), *noted* (other values, and
something is said), *silent* (other values, nothing is said), *refused* (one line), or how it failed. A silent
change is a failure too, unless the case says why no reader can know (`Case.unknowable`).
"""

"""The sparse inference engine: trained, masked models packed so that sleeping connections cost next to no
time or bytes.

Nothing in here imports torch, except `pack.py`, which turns a trained model into a file. Read in this order:
layouts.py (where the weights lie), kernels.py (what is done with them), cells.py (a whole sequence in one call),
recogniser.py and captioner.py (whole models), format.py (their files).
"""

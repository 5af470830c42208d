"""``pfc plan`` against this machine: its ceilings (here.py), and real steps next to what is predicted (verify.py)."""

"""``pfc plan``: what a configuration needs and how fast it can be, without training anything.

machine.py what a machine and its ranks offer · setup.py what decides a head's cost · backbone.py a dry run of the
network · memory.py bytes by part · traffic.py bytes between ranks and to the host · timing.py seconds by phase ·
limits.py the largest number of identities and rate that fit, and advice · report.py tables, JSON and the picture
"""

"""In which order training sees the samples.

``orders`` has the global order and that of blocks for cold disks, ``balanced`` the one of P identities with K images,
``mixed`` the order of joint data sets.
"""

"""Data sets that lie elsewhere: in an object store (s3://, gs://), on a web server, or on a slow mount (file://).

``store`` reads parts of remote files, and asks again where an answer fails. ``blocks`` keeps those parts on a local
disk, for all processes of this machine, and maps them into memory as if the whole file was there. ``mirror`` is the
local folder that stands for a remote data set, with its small files whole.
"""

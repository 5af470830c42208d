"""Triton kernels for GPUs: ``logsumexp`` is the head's kernel, of ``powers`` (product and exponentials) and ``rows``
(normalised); ``gradient`` the row gradient that it leaves, ``update`` the optimizers' passes, ``draw`` the class
sample."""

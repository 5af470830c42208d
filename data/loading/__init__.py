"""From shards to batches of tensors.

``loader`` is what training iterates over; ``batches`` says what any loader has. ``reader`` gives it one rank's part of
each global batch, with ``plain`` (and ``plain.c``) for the records that most are, ``headers`` for images that would end
DALI, ``damage`` for how many may be bad, ``readahead`` for disks. ``dali`` holds the pipelines, ``augment`` what is
drawn for them, ``decoding`` the images of an evaluation, ``device`` all that depends on the device.
"""

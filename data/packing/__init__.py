"""Images into RecordIO shards.

``pack`` has the functions, one for each kind of source; ``options`` their options. ``run`` is the packing itself: it
asks a source (``sources/``) for images, chooses by ``selection``, stores them as ``storing`` says, and gives them to
``writer``. ``resume`` stores what an interrupted packing needs to continue; ``summary`` reports what was done.
"""

"""How well a backbone tells identities apart.

sets        what a run is judged by; evaluate: embeddings on all ranks, and verification pairs
protocol    which figures a table asks for; judgement: what comes out; items: images or templates (templates)
search      places of the mates in a gallery; every_pair: histograms of all pairs
metrics, identification, retrieval    the figures, each a function; intervals: how far they could be off
threshold   the operating point; elsewhere: embeddings of other programs; figures: what figures are called
"""

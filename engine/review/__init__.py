"""What a trained network says about data.

``embedded`` keeps a set's embeddings in a file; ``overlap`` is what two sets share; ``labels`` those that look wrong.
"""

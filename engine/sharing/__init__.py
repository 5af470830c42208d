"""A trained backbone for others: as ONNX, in the layout of the Hugging Face Hub; and its embeddings of many images.

onnx_file   writes ONNX, in float32, float16 or int8, and measures what ONNX Runtime makes of it
hub         the network in the layout of the Hugging Face Hub, written and loaded; card: its model card
preparing   what an image is before the network gets it: what the files say of it, and the doing
shards      embeddings of millions of images, in files of some thousands
"""

"""The only code that touches files: checkpoints in (reader.py), folders out (files.py), and the proof of both
(manifest.py).

Everything that comes from a file is checked before it is used, and nothing in a file is ever run: no pickle is loaded,
no class is imported by name, and no path leads out of the model's folder.
"""

"""Training and sampling settings: base.py holds the tree, presets.py its parts, a leaf file is one config."""

"""How a document becomes chunks: its tokens, where it may be cut, windows, late chunks."""

"""From texts and token ids to vectors: model folders, tokenizers, forward passes, pooling. No Ray, no pyarrow."""

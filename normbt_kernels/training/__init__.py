"""`normbt train`: preference data and a model in, a reward model and a comparison of losses out."""

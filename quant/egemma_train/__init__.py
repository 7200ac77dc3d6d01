"""Training in torch: a recipe, from pairs of texts to a checkpoint folder."""

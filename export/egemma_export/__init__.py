"""From a checkpoint to a bundle that has been proven."""

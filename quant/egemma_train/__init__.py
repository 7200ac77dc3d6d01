"""Training in torch: pairs -> batches -> contrastive loss -> a checkpoint folder."""

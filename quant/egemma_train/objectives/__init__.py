"""What a stage trains for: contrast, denoising, and the losses."""

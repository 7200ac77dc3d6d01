"""What the model is.

The files beside this one and those of `checkpoint` need NumPy and sentencepiece only; `nn` needs
torch.
"""

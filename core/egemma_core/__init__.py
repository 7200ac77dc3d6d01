"""What the model is.

The files beside this one need NumPy and sentencepiece only; `nn` needs torch.
"""

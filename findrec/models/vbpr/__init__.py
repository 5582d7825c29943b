"""The VBPR model, and BPR matrix factorisation."""

"""The MFN model: attention by content over values of ids."""

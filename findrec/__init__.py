"""FindRec: training and full-catalogue evaluation of multimodal recommenders on very long histories."""

__version__ = "0.1.0"

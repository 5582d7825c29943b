"""The HM4SR model."""

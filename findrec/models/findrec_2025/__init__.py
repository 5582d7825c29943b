"""FindRec as published in 2025, kept for comparison."""

"""Leaderboards: several configurations trained with several seeds, in one table with significance."""

"""The round, where it runs, who takes part and how clients come together."""

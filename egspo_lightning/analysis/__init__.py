"""Reading what a run has recorded of its tokens: as data frames, as plots, as colored text."""

"""Analysis of token records: data frames, plots and colored completions."""

"""What is written about a run: result files, plots, the page."""

"""Speed, memory and start-up."""

"""Tables and figures of Li et al. 2023."""

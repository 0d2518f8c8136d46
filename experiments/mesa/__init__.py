"""Tables and figures of Qiao et al. 2019."""

"""What is measured of a net: accuracy and attack success, activations, distances."""
